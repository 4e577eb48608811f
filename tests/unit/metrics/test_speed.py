from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from flashvaed_cli.metrics.speed import (
    SpeedResult,
    peak_memory_bytes,
    speed_ratio,
    synchronizer,
    time_alternating,
)
from flashvaed_cli.progress import SilentProgress


def test_candidates_take_turns_and_warm_up_is_left_out() -> None:
    calls: list[str] = []
    results = time_alternating(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, num_warmup=1, num_rounds=3
    )
    assert calls == ["a", "b"] * 4
    assert list(results) == ["a", "b"]
    assert all(len(result.seconds) == 3 and result.min > 0 for result in results.values())


def test_the_clock_is_read_after_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("flashvaed_cli.metrics.speed.time.perf_counter", lambda: clock[0])
    queued = [0.0]

    def synchronize() -> None:
        clock[0] += queued[0]
        queued[0] = 0.0

    def launch() -> None:
        queued[0] += 2.0

    queued[0] = 5.0  # somebody else's work must not count
    results = time_alternating({"a": launch}, num_warmup=0, num_rounds=2, synchronize=synchronize)
    assert results["a"].seconds == (2.0, 2.0)


def test_progress_counts_every_call() -> None:
    class Counting(SilentProgress):
        total: int | None = 0
        done = 0

        @contextmanager
        def task(self, description: str, total: int | None = None) -> Iterator[Counting]:
            self.total = total
            yield self

        def advance(self, count: int = 1, **info: object) -> None:
            self.done += count

    progress = Counting()
    time_alternating({"a": int, "b": int}, num_warmup=1, num_rounds=2, progress=progress)
    assert progress.total == progress.done == 6


def test_statistics() -> None:
    result = SpeedResult((3.0, 1.0, 2.0))
    assert (result.median, result.min, result.max) == (2.0, 1.0, 3.0)
    assert result.per_second(17) == 8.5


def test_ratio_is_paired_by_round() -> None:
    """A machine that is twice as slow in one round gives the same ratio there."""
    ratio = speed_ratio(SpeedResult((4.0, 8.0, 5.0)), SpeedResult((1.0, 2.0, 1.0)))
    assert ratio.ratios == (4.0, 4.0, 5.0)
    assert (ratio.median, ratio.min, ratio.max) == (4.0, 4.0, 5.0)
    with pytest.raises(ValueError, match="longer"):
        speed_ratio(SpeedResult((1.0,)), SpeedResult((1.0, 2.0)))


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="nothing to time"):
        time_alternating({})
    with pytest.raises(ValueError, match="nothing to time"):
        time_alternating({"a": int}, num_rounds=0)


def test_the_cpu_needs_no_synchronizing() -> None:
    assert synchronizer("cpu") is None


def test_cpu_peak_sees_what_was_freed_again() -> None:
    def call() -> torch.Tensor:
        return torch.ones(64 * 2**20 // 4).sum()  # 64 MiB that are gone at the end

    peak = peak_memory_bytes(call, "cpu")
    if not sys.platform.startswith("linux") or peak.num_bytes is None:
        pytest.skip("this system does not report the peak of the resident set")
    assert 60 * 2**20 < peak.num_bytes < 120 * 2**20  # page rounding and the interpreter's own needs
    assert "resident set" in peak.meaning


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_peak_and_synchronizer() -> None:
    peak = peak_memory_bytes(lambda: torch.ones(64 * 2**20 // 4, device="cuda").sum(), "cuda")
    assert peak.num_bytes is not None
    assert peak.num_bytes >= 64 * 2**20
    assert synchronizer("cuda") is not None


def test_rounds_stop_where_the_next_would_not_fit_the_budget() -> None:
    def work() -> None:
        time.sleep(0.05)

    limited = time_alternating({"a": work}, num_rounds=50, budget_s=0.3)["a"]
    assert 2 <= len(limited.seconds) <= 5
    assert len(time_alternating({"a": work}, num_rounds=3, budget_s=0.001)["a"].seconds) == 1
    assert len(time_alternating({"a": work}, num_rounds=3)["a"].seconds) == 3
