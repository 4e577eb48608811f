from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from flashvaed_cli.calibrate.latency import OTHER, measure_latency
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.metrics.module_times import profile_modules
from tests.toy import DECODER_SPECS, toy_decoder, toy_latents

BLOCK_MS, LAYER_MS = 100.0, 1.0


class FixedTimes:
    """A profiler that gives every block one time and every layer another, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, decoder: Decoder, call: Callable[[], object], names: list[str]) -> dict[str, float]:
        call()
        self.calls.append(names)
        return {name: BLOCK_MS if name.count(".") == 2 else LAYER_MS for name in names}


def test_operators_of_a_stage_add_up_to_its_blocks() -> None:
    decoder = toy_decoder(DECODER_SPECS["flash"])
    table = measure_latency(decoder, toy_latents(), FixedTimes())
    assert list(table) == [stage.name for stage in decoder.spec.stages]
    for stage in decoder.spec.stages:
        assert sum(table[stage.name].values()) == pytest.approx(BLOCK_MS * len(stage.blocks))
    assert table["mid"] == {"norm": 4.0, "dwsep3d": 4.0, "attention": BLOCK_MS, OTHER: 192.0}
    assert table["up1"] == {
        "norm": 6.0,
        "dwsep3d": 6.0,
        "pointwise": 1.0,
        "causal3d": 1.0,
        "frame2d": 1.0,
        OTHER: 385.0,
    }
    assert table["up3"] == {"norm": 6.0, "frame2d": 6.0, "pointwise": 3.0, OTHER: 285.0}
    assert table["head"] == {"norm": 1.0, "causal3d": 1.0, OTHER: 98.0}


def test_every_module_is_timed_once() -> None:
    profiler = FixedTimes()
    measure_latency(toy_decoder(), toy_latents(), profiler)
    (names,) = profiler.calls
    assert len(names) == len(set(names))


def test_temporal_upsamplers_do_not_run_on_one_frame() -> None:
    profiler = FixedTimes()
    table = measure_latency(toy_decoder(), toy_latents(1), profiler)
    assert not [name for name in profiler.calls[0] if name.endswith(".temporal")]
    assert table["up0"]["causal3d"] == 6.0


@pytest.mark.parametrize("num_latents", [1, 2])
def test_with_the_real_profiler(num_latents: int) -> None:
    decoder = toy_decoder(DECODER_SPECS["flash"])
    table = measure_latency(decoder, toy_latents(num_latents), partial(profile_modules, num_rounds=1, num_warmup=0))
    assert all(ms >= 0 for operators in table.values() for ms in operators.values())
    assert all(table[stage][operator] > 0 for stage, operator in [("mid", "attention"), ("up3", "frame2d")])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
