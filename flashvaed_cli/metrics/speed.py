"""How fast candidates run against each other, in one process and in alternation.

A machine drifts (heat, other work), so candidates take turns A B A B and are compared round by round.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flashvaed_cli.progress import Progress, SilentProgress


@dataclass(frozen=True)
class SpeedResult:
    """Wall time of one candidate, one value per round, warm-up left out."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        """Fastest round in seconds."""
        return min(self.seconds)

    @property
    def max(self) -> float:
        """Slowest round in seconds."""
        return max(self.seconds)

    def per_second(self, count: int) -> float:
        """Units per second at the median, for calls that handle `count` units (frames) each."""
        return count / self.median


@dataclass(frozen=True)
class SpeedRatio:
    """How many times faster one candidate is than another, one value per round. Spread: min to max."""

    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def min(self) -> float:
        """Smallest ratio."""
        return min(self.ratios)

    @property
    def max(self) -> float:
        """Largest ratio."""
        return max(self.ratios)


@dataclass(frozen=True)
class PeakMemory:
    """Growth of memory during one call. `num_bytes` is None where it cannot be measured; `meaning` says what it is."""

    num_bytes: int | None
    meaning: str


def time_alternating(
    candidates: Mapping[str, Callable[[], object]],
    *,
    num_warmup: int = 1,
    num_rounds: int = 5,
    budget_s: float | None = None,
    synchronize: Callable[[], object] | None = None,
    progress: Progress | None = None,
) -> dict[str, SpeedResult]:
    """Time candidates in turns.

    Args:
        candidates: name to call; run in this order in every round.
        num_warmup: rounds that are run but not counted (compilation, allocator, caches).
        num_rounds: counted rounds, at least 1.
        budget_s: a round begins only if it is expected to end within this many seconds; one is always counted.
        synchronize: called before each reading of the clock; see `synchronizer`.
        progress: told after every call.
    Returns:
        Results in the order of `candidates`.
    Raises:
        ValueError: no candidates or no rounds.
    """
    if not candidates or num_rounds < 1 or num_warmup < 0:
        raise ValueError(f"{len(candidates)} candidates in {num_warmup} + {num_rounds} rounds leave nothing to time")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    total = (num_warmup + num_rounds) * len(candidates)
    started = time.perf_counter()
    with (progress or SilentProgress()).task("timing", total) as task:
        for round_index in range(num_warmup + num_rounds):
            spent = time.perf_counter() - started
            if budget_s is not None and round_index > num_warmup and spent * (1 + 1 / round_index) > budget_s:
                break
            for name, call in candidates.items():
                elapsed = _time_once(call, synchronize)
                if round_index >= num_warmup:
                    seconds[name].append(elapsed)
                task.advance(candidate=name, seconds=f"{elapsed:.3g}")
    return {name: SpeedResult(tuple(values)) for name, values in seconds.items()}


def _time_once(call: Callable[[], object], synchronize: Callable[[], object] | None) -> float:
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    result = call()
    if synchronize is not None:
        synchronize()
    elapsed = time.perf_counter() - start
    del result  # freeing the output is not part of the time, and must not wait for the next call
    return elapsed


def speed_ratio(baseline: SpeedResult, candidate: SpeedResult) -> SpeedRatio:
    """How many times faster `candidate` is than `baseline`, paired by round; above 1: faster.

    Raises:
        ValueError: they were not timed in the same number of rounds.
    """
    pairs = zip(baseline.seconds, candidate.seconds, strict=True)
    return SpeedRatio(tuple(slow / fast for slow, fast in pairs))


def synchronizer(device: torch.device | str) -> Callable[[], object] | None:
    """What waits for the device's queued work; None on the CPU, which queues nothing."""
    device = torch.device(device)
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return None


def peak_memory_bytes(call: Callable[[], object], device: torch.device | str) -> PeakMemory:
    """Run `call` once and measure how far memory grows above what is held just before it.

    Weights and inputs that are there already do not count, so candidates in one process do not charge each other.
    CUDA: the allocator's peak; fragmentation and the context are left out.
    CPU (Linux): growth of the resident set. Free pages are given back first; those that the process still
    holds and uses again are not seen, so it is a lower bound, near the truth when the activations are large.
    A process per candidate would see those too, but also what the libraries set up once. Elsewhere: not measured.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return PeakMemory(torch.cuda.max_memory_allocated(device) - before, "growth of the CUDA allocator's peak")
    if device.type == "cpu":
        return _peak_resident_growth(call)
    call()
    return PeakMemory(None, f"not measured on {device.type}")


def _peak_resident_growth(call: Callable[[], object]) -> PeakMemory:
    gc.collect(1)  # a full collection takes longer than many a decoder
    _return_free_pages()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
        before = _status_bytes("VmHWM")
    except OSError:
        before = None
    call()
    after = None if before is None else _status_bytes("VmHWM")
    if before is None or after is None:
        return PeakMemory(None, "not measured: this system does not report the peak of the resident set")
    return PeakMemory(max(0, after - before), "growth of the resident set, a lower bound")


def _return_free_pages() -> None:
    """Ask glibc to give back what earlier calls freed, so that using it again counts. No effect elsewhere."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None
