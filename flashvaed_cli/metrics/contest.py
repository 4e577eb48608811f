"""A contest of decoders: cold start, peak memory and speed of each, in one process, taking turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flashvaed_cli.errors import is_out_of_memory
from flashvaed_cli.metrics.speed import PeakMemory, SpeedResult, peak_memory_bytes, synchronizer, time_alternating
from flashvaed_cli.progress import Progress, SilentProgress


@dataclass(frozen=True)
class Contestant:
    """One row of a speed table.

    Attributes:
        name: as shown; unique in a contest.
        prepare: gets everything ready and returns the call that is timed. Its time is part of the cold start.
        refusal: why it is not run at all; None if it is.
    """

    name: str
    prepare: Callable[[], Callable[[], object]]
    refusal: str | None = None


@dataclass(frozen=True)
class ContestResult:
    """The result of one contestant.

    Attributes:
        speed: of the warm calls; None if it failed.
        cold_start_s: preparation and the first call, compilation included. The process itself is warm: what an
            earlier contestant set up (threads, kernels) is not paid for again.
        memory: growth during a warm call.
        failure: why there are no figures.
    """

    name: str
    speed: SpeedResult | None = None
    cold_start_s: float | None = None
    memory: PeakMemory | None = None
    failure: str | None = None

    @property
    def compile_s(self) -> float | None:
        """How much longer the cold start took than a warm call."""
        return None if self.speed is None or self.cold_start_s is None else self.cold_start_s - self.speed.median


@torch.no_grad()
def run_contest(
    contestants: Sequence[Contestant],
    device: torch.device | str,
    *,
    num_rounds: int = 5,
    budget_s: float | None = None,
    progress: Progress | None = None,
) -> list[ContestResult]:
    """Start every contestant cold, call it once more for its memory, then time all in turns.

    One that runs out of memory is left out of the rounds, and its result says so.

    Args:
        num_rounds: counted rounds, at least 1.
        budget_s: see `time_alternating`.
        progress: advanced after every call.
    Returns:
        Results in the order of `contestants`.
    """
    progress = progress or SilentProgress()
    calls: dict[str, Callable[[], object]] = {}
    results: dict[str, ContestResult] = {}
    with progress.task("warming up", len(contestants)) as task:
        for contestant in contestants:
            name = contestant.name
            started = _start(contestant, device)
            if isinstance(started, ContestResult):
                results[name] = started
            else:
                calls[name], results[name] = started
            task.advance(candidate=name)
    if calls:
        speeds = time_alternating(
            calls,
            num_warmup=0,
            num_rounds=num_rounds,
            budget_s=budget_s,
            synchronize=synchronizer(device),
            progress=progress,
        )
        for name, speed in speeds.items():
            cold = results[name]
            results[name] = ContestResult(name, speed, cold.cold_start_s, cold.memory)
    return [results[contestant.name] for contestant in contestants]


def _start(
    contestant: Contestant, device: torch.device | str
) -> ContestResult | tuple[Callable[[], object], ContestResult]:
    """The warm call and how long starting it took, or the failure."""
    name = contestant.name
    if contestant.refusal is not None:
        return ContestResult(name, failure=contestant.refusal)
    synchronize = synchronizer(device) or (lambda: None)
    try:
        synchronize()
        start = time.perf_counter()
        call = contestant.prepare()
        call()
        synchronize()
        cold_start_s = time.perf_counter() - start
        memory = peak_memory_bytes(call, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = ContestResult(name, failure="out of memory")
    else:
        return call, ContestResult(name, cold_start_s=cold_start_s, memory=memory)
    free_device_memory(device)
    return failure


def free_device_memory(device: torch.device | str) -> None:
    """Release what a failed call left behind."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
