from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flashvaed_cli.errors import is_out_of_memory
from flashvaed_cli.metrics.contest import Contestant, run_contest
from flashvaed_cli.metrics.free_memory import free_bytes
from flashvaed_cli.metrics.speed import SpeedResult


class Runner:
    """Counts its calls, and fails as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error

    def prepare(self) -> Callable[[], object]:
        return self.call

    def call(self) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error


def test_cold_start_memory_and_rounds() -> None:
    runners = [Runner(), Runner()]
    contestants = [Contestant(name, runner.prepare) for name, runner in zip("ab", runners, strict=True)]
    results = run_contest(contestants, "cpu", num_rounds=3)
    assert [result.name for result in results] == ["a", "b"]
    for result, runner in zip(results, runners, strict=True):
        assert runner.calls == 1 + 1 + 3  # cold, for its memory, timed
        assert result.speed is not None and len(result.speed.seconds) == 3
        assert result.cold_start_s is not None and result.cold_start_s > 0
        assert result.memory is not None and result.failure is None


def test_compile_seconds_are_the_cold_start_less_a_warm_call() -> None:
    result = run_contest([Contestant("a", Runner().prepare)], "cpu", num_rounds=1)[0]
    assert result.speed is not None and result.cold_start_s is not None
    assert result.compile_s == result.cold_start_s - result.speed.median
    assert isinstance(result.speed, SpeedResult)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_who_runs_out_of_memory_is_left_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    small, large = Runner(), Runner(error)
    results = run_contest([Contestant("large", large.prepare), Contestant("small", small.prepare)], "cpu", num_rounds=2)
    assert (results[0].speed, results[0].failure, large.calls) == (None, "out of memory", 1)
    assert results[1].speed is not None and small.calls == 4


def test_who_is_refused_is_not_run() -> None:
    refused = Runner()
    result = run_contest([Contestant("a", refused.prepare, "too large")], "cpu")[0]
    assert (result.failure, result.speed, result.compile_s, refused.calls) == ("too large", None, None, 0)


def test_a_bug_stays_one() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run_contest([Contestant("a", Runner(RuntimeError("shapes do not fit")).prepare)], "cpu")


def test_an_allocation_that_no_machine_has() -> None:
    def prepare() -> Callable[[], object]:
        return lambda: torch.empty(2**60)

    assert run_contest([Contestant("a", prepare)], "cpu")[0].failure == "out of memory"


def test_free_memory() -> None:
    free = free_bytes("cpu")
    assert free is None or 0 < free < 2**50
    assert free_bytes("meta") is None
