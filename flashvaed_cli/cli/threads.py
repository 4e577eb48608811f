"""How torch's threads behave, settled before torch is loaded, so that others on the machine need not wait for them."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from pathlib import Path

_SPIN_COUNT = "10000"
"""How many turns libgomp's threads spin at the end of a parallel region before they sleep; its default is millions."""

_WAIT_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_CGROUPS = Path("/sys/fs/cgroup")


def prepare_threads(environment: MutableMapping[str, str], cores: int, cgroups: Path = _CGROUPS) -> None:
    """Bound the spinning, and use no more threads than the container's quota allows. The user's settings win."""
    if not any(name in environment for name in _WAIT_SETTINGS):
        environment["GOMP_SPINCOUNT"] = _SPIN_COUNT
    quota = cpu_quota(cgroups)
    if quota is not None and quota < cores and "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, math.ceil(quota)))


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
