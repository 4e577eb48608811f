"""How torch's threads behave, settled before torch is loaded, so that others on the machine need not wait for them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

_SPIN_COUNT = "10000"
"""How many turns libgomp's threads spin at the end of a parallel region before they sleep; its default is millions."""

_WAIT_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_CGROUPS = Path("/sys/fs/cgroup")

_FOLLOW_LOAD = ("decode", "eval")
"""Commands that take fewer threads beside others. Those that write weights do not: sums over another number of threads
round otherwise, and the same command would write other weights on a busy machine."""
_LOAD = Path("/proc/loadavg")
_NUM_LOOKS = 5
_BETWEEN_LOOKS_S = 0.01


def prepare_threads(
    environment: MutableMapping[str, str],
    cores: int,
    *,
    command: str = "",
    machine_cores: int | None = None,
    cgroups: Path = _CGROUPS,
    load: Path = _LOAD,
) -> None:
    """Bound the spinning, and use no more threads than the container's quota allows; some commands, no more than there
    are free cores.

    A thread that waits for its core holds up the others at the end of every parallel region, of which the fast
    operators have many: on two cores beside two busy processes they took 2 to 4 times as long with two threads as with
    one. At least half of the cores are used, however busy they are. The user's settings win.

    Args:
        cores: that the process may run on.
        command: that is about to run.
        machine_cores: of the whole machine, as many as `cores` if not given.
    """
    if not any(name in environment for name in _WAIT_SETTINGS):
        environment["GOMP_SPINCOUNT"] = _SPIN_COUNT
    if "OMP_NUM_THREADS" in environment:
        return
    quota = cpu_quota(cgroups)
    allowed = cores if quota is None else min(cores, max(1, math.ceil(quota)))
    threads = allowed
    if command in _FOLLOW_LOAD:
        free = (machine_cores or cores) - num_busy(load)
        threads = min(allowed, max(free, allowed // 2, 1))
    if threads < cores:
        environment["OMP_NUM_THREADS"] = str(threads)


def available_cores() -> int:
    """Cores that the process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_busy(load: Path = _LOAD) -> int:
    """Other threads of the machine that run or wait for a core: the fewest of a few looks; 0 where nothing tells."""
    fewest = math.inf
    for look in range(_NUM_LOOKS):
        if look:
            time.sleep(_BETWEEN_LOOKS_S)
        try:
            running = int(load.read_text().split()[3].partition("/")[0]) - 1  # without this one
        except (OSError, ValueError, IndexError):
            return 0
        fewest = min(fewest, max(running, 0))
        if fewest == 0:
            break
    return int(fewest)


def cpu_quota(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the process may use at a time, by the tightest limit of its control groups; None if unlimited."""
    quotas = []
    for folder in _folders(cgroups, own):
        try:
            if (folder / "cpu.max").exists():  # version 2
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)


def _folders(cgroups: Path, own: Path) -> list[Path]:
    """The process's own groups and their parents, in both versions."""
    found = [cgroups, cgroups / "cpu"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = cgroups if not controllers else cgroups / "cpu" if "cpu" in controllers.split(",") else None
        if root is not None:
            parts = [part for part in path.split("/") if part]
            found += [root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return found
