from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flashvaed_cli.calibrate import width_latency
from flashvaed_cli.calibrate.width_latency import measure_width_latency
from flashvaed_cli.decoders.modules import bands
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.latency import WidthLatency
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.families.wan21.spec import WAN21, wan_decoder_spec
from flashvaed_cli.metrics.module_times import profile_modules
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery.respec import spec_of_widths
from tests.toy import LATENT_WIDTH, toy_decoder, toy_latents

pytestmark = pytest.mark.unchecked  # many runs of what other modules check

SHALLOW = WAN21.shallow_stages


class ParameterTimes:
    """A profiler for which every module takes as many milliseconds as it has parameters, times a load that grows."""

    def __init__(self, load_step: float = 0.0) -> None:
        self.load, self.load_step = 1.0, load_step
        self.num_warmups: list[int] = []
        self.models: list[nn.Module] = []

    def __call__(
        self, model: nn.Module, call: Callable[[], object], names: list[str], *, num_warmup: int, num_rounds: int
    ) -> dict[str, float]:
        assert num_rounds == 1
        if model not in self.models:
            call()  # shapes fit
            self.models.append(model)
        self.num_warmups.append(num_warmup)
        if model is self.models[0]:  # the whole decoder comes first, and again before every few
            self.load += self.load_step
        return {name: self.load * sum(p.numel() for p in model.get_submodule(name).parameters()) for name in names}


def measure(
    profile: ParameterTimes, decoder: Decoder | None = None, *, budget_s: float = 1e9, stages: tuple[str, ...] = SHALLOW
) -> WidthLatency:
    return measure_width_latency(
        decoder or toy_decoder(),
        toy_latents(),
        stages,
        narrow=spec_of_widths,
        profile=profile,
        num_rounds=2,
        budget_s=budget_s,
        progress=SilentProgress(),
    )


def parameters(widths: dict[str, int]) -> int:
    spec = spec_of_widths(toy_decoder().spec, widths)
    return Decoder(spec).parameter_count


def full_widths(stages: tuple[str, ...] = SHALLOW) -> dict[str, int]:
    return {group.name: group.width for group in channel_groups(toy_decoder().spec) if group.stage in stages}


@pytest.mark.parametrize("stages", [("up2", "up3"), ("up3",), ("up1", "up2", "up3"), ("mid", "up0")])
def test_on_the_ladders_the_model_is_what_was_measured(stages: tuple[str, ...]) -> None:
    model = measure(ParameterTimes(), stages=stages)
    full = full_widths(stages)
    assert model(full) == pytest.approx(parameters({}))
    for rung in range(3):
        widths = {name: ladder[min(rung, len(ladder) - 1)] for name, ladder in model.ladders.items()}
        assert model(widths) == pytest.approx(parameters(widths), rel=1e-6)
    # Each stage's stream by itself: upsamplers between a narrow and a wide stream were measured too.
    axes = [axis for block in model.blocks for axis in block.axes]
    alone = [name for name in full if all(len(axis) == 1 for axis in axes if name in axis)]
    for name in (name for name in alone if name.endswith(".stream")):
        widths = {**full, name: model.ladders[name][-1]}
        assert model(widths) == pytest.approx(parameters(widths), rel=1e-6)


def test_ladders_are_those_of_the_groups() -> None:
    ladders = measure(ParameterTimes()).ladders
    assert set(ladders) == set(full_widths())
    assert (ladders["up2.stream"], ladders["up3.stream"]) == ((8, 6, 4, 3, 2, 1), (4, 3, 2, 1))


def test_without_time_every_second_width_is_timed_once() -> None:
    profile = ParameterTimes()
    model = measure(profile, budget_s=0.0)
    assert model.ladders["up2.stream"] == (8, 4, 2, 1)
    assert model.ladders["up3.stream"] == (4, 2, 1)
    num_tails = len(profile.models) - 1
    assert num_tails == 4 * 4 - 1
    assert sum(profile.num_warmups) == 0


@pytest.mark.parametrize("longest", [2.0, 6.0])
def test_the_whole_is_timed_again_after_a_while(longest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """First of all, and in each round before the first narrowed one and whenever those have taken so many times it."""
    monkeypatch.setattr(width_latency, "_LONGEST_BETWEEN", longest)
    profile = ParameterTimes()
    measure(profile, budget_s=0.0)
    whole, *tails = profile.models
    sizes = [sum(p.numel() for p in tail.parameters()) for tail in tails]
    expected, between = 2, 0.0
    for size in sizes[:-1]:
        between += size
        if between >= longest * sum(p.numel() for p in whole.parameters()):
            expected, between = expected + 1, 0.0
    assert len(profile.num_warmups) - len(tails) == expected


def test_blocks_are_timed_in_bands_as_a_decoding_runs_them() -> None:
    active: list[bool] = []

    class Watching(ParameterTimes):
        def __call__(self, model: nn.Module, *more: Any, **settings: Any) -> dict[str, float]:
            active.append(bands._active.get())
            return super().__call__(model, *more, **settings)

    measure(Watching(), budget_s=0.0)
    assert active and all(active) and not bands._active.get()


def test_a_load_that_grows_leaves_the_ratios_alone() -> None:
    quiet, busy = measure(ParameterTimes()), measure(ParameterTimes(load_step=0.5))
    full = full_widths()
    narrow = {name: ladder[-1] for name, ladder in quiet.ladders.items()}
    assert busy(full) > 2 * quiet(full)
    assert busy(full) / busy(narrow) == pytest.approx(quiet(full) / quiet(narrow))


def test_with_the_real_profiler_the_decoder_is_left_as_it_is() -> None:
    decoder = Decoder(wan_decoder_spec(2, LATENT_WIDTH)).requires_grad_(False)
    before = {name: (p.clone(), p.stride()) for name, p in decoder.named_parameters()}
    model = measure_width_latency(
        decoder,
        toy_latents(2, 1, 1).double(),
        SHALLOW,
        narrow=spec_of_widths,
        profile=partial(profile_modules, synchronize=lambda: None),
        num_rounds=1,
        budget_s=0.0,
        progress=SilentProgress(),
    )
    assert model.fixed_ms > 0 and all(ms > 0 for block in model.blocks for ms in block.latency_ms)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.stride() == before[name][1]


def test_stages_without_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="no channel group in head"):
        measure(ParameterTimes(), stages=("head",))
