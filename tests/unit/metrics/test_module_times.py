from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashvaed_cli.errors import SpecError
from flashvaed_cli.metrics.module_times import profile_modules


class Waiting(nn.Module):
    """Moves a fake clock."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += self.seconds
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("flashvaed_cli.metrics.module_times.time.perf_counter", lambda: now[0])
    return now


def test_times_are_inclusive_and_summed_over_chunks(clock: list[float]) -> None:
    inner = nn.Sequential(Waiting(clock, 0.25), Waiting(clock, 0.5))
    model = nn.Sequential(inner, Waiting(clock, 1.0))

    def two_chunks() -> None:
        model(torch.zeros(1))
        model(torch.zeros(1))

    times = profile_modules(model, two_chunks, ["1", "0", "0.1"], num_warmup=1, num_rounds=3)
    assert times == {"1": 2000.0, "0": 1500.0, "0.1": 1000.0}


@pytest.mark.parametrize(("budget_s", "num_calls", "ms"), [(0.5, 1, 1000.0), (5.0, 3, 2500.0), (100.0, 4, 3000.0)])
def test_a_slow_model_gets_fewer_rounds(clock: list[float], budget_s: float, num_calls: int, ms: float) -> None:
    model, calls = nn.Sequential(Waiting(clock, 0.0)), []

    def each_call_takes_a_second_longer() -> None:
        calls.append(len(calls) + 1.0)
        model[0].seconds = calls[-1]
        model(torch.zeros(1))

    times = profile_modules(model, each_call_takes_a_second_longer, ["0"], num_rounds=3, budget_s=budget_s)
    assert (len(calls), times["0"]) == (num_calls, ms)


def test_unknown_and_idle_modules_are_named(clock: list[float]) -> None:
    model = nn.Sequential(Waiting(clock, 1.0), nn.Identity())
    with pytest.raises(SpecError, match=r"named up9, up8"):
        profile_modules(model, lambda: None, ["0", "up9", "up8"])
    with pytest.raises(SpecError, match=r"did not run.*: 1"):
        profile_modules(model, lambda: model[0](torch.zeros(1)), ["0", "1"])


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = nn.Sequential(nn.Identity())

    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        profile_modules(model, fail, ["0"])
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
