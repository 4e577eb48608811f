"""The native layout: what is linked, which widths there are, and an attention that loses nothing inside."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.blocks import Attention
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import AttentionSpec
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from flashvaed_cli.metrics.speed import SpeedResult
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.stages.latency_model import TimedClip
from flashvaed_cli.stages.prune import native as native_stage
from flashvaed_cli.surgery.attention_fit import set_collapsed
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.native import (
    base_width_step,
    linked_groups,
    native_base_width,
    native_spec,
    nearest_base_width,
    select_native,
)
from flashvaed_cli.surgery.reconstruct import reconstruct_coder
from flashvaed_cli.surgery.respec import narrowed_spec
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.toy import kept_of, original_spec


@torch.no_grad()
def test_a_collapsed_attention_gives_the_same() -> None:
    torch.manual_seed(0)
    wide = Attention(AttentionSpec(width=6, inner_width=16), "mid.1").eval()
    narrow = Attention(AttentionSpec(width=6, inner_width=6), "mid.1").eval()
    set_collapsed(narrow, wide.qkv.weight, wide.qkv.bias, wide.proj.weight, wide.proj.bias)
    x = torch.randn(1, 6, 2, 4, 5)
    torch.testing.assert_close(narrow(x), wide(x), rtol=0, atol=1e-5)


def test_what_identity_shortcuts_join_is_one_set() -> None:
    linked = {group.name: set(group.tensors) for group in linked_groups(original_spec())}
    streams = [tensors for tensors in linked.values() if "mid.0" in tensors]
    assert len(streams) == 1
    assert {"conv_in.0", "mid.0", "mid.1", "mid.2", "up0.0", "up0.1", "up0.2"} <= streams[0]
    assert "up1.0" not in streams[0]


def test_the_student_is_the_original_at_another_width_and_the_fit_helps() -> None:
    torch.manual_seed(0)
    decoder = Decoder(wan_decoder_spec(3, 4)).eval().requires_grad_(False)
    clips = [torch.randn(1, 4, 2, 6, 6) for _ in range(2)]
    statistics = collect_statistics(decoder, clips, num_clips=2, progress=SilentProgress())
    spec = native_spec(decoder.spec, 2)
    kept, _ = select_native(decoder, statistics, spec, rule="greedy-r2")
    assert kept["conv_in.0"] == kept["up0.2"] and len(kept["up0.2"]) == 8
    student = transfer_weights(decoder, spec, kept)
    before = (student(clips[0]) - decoder(clips[0])).square().mean()
    settings = FitSettings(mode="full", dampening_frac=1e-3, num_separable_iterations=1, seed=0)
    reconstruct_coder(
        decoder, student, kept, clips, first_block="conv_in.0", settings=settings, progress=SilentProgress()
    )
    assert student.spec == wan_decoder_spec(2, 4)
    assert (student(clips[0]) - decoder(clips[0])).square().mean() < before


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.native_obstacle is None])
def test_every_ratio_gives_a_native_width_that_can_be_built(name: str) -> None:
    """The released decoder, as `prune --layout native --ratio 0.7` narrows it; LTX-Video needs multiples of 4."""
    family = FAMILIES[name]
    released = family.decoder_spec(family.released_base_width, family.latent_width)
    for round_to in (1, 3):
        step = base_width_step(released, round_to)
        assert step % round_to == 0
        for percent in range(2, 100, 7):
            width = nearest_base_width(family.released_base_width, percent / 100, step)
            assert native_base_width(native_spec(released, width)) == width


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_native_or_says_why_not(name: str) -> None:
    family = FAMILIES[name]
    spec = family.decoder_spec(8, 4)
    if family.native_obstacle is None:
        assert native_base_width(spec) == 8
        return
    with pytest.raises(SpecError, match=f"{name} cannot be native: {family.native_obstacle}"):
        native_base_width(spec)


@torch.no_grad()
def test_the_widest_decoder_that_is_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """By timing: here a decoder takes as long as it is wide."""
    decoder = Decoder(wan_decoder_spec(16, 4))
    clip = TimedClip(5, 16, torch.device("cpu"), "float32")

    def times_of(before: Decoder, after: Decoder, *_: object) -> dict[str, SpeedResult]:
        return {
            name: SpeedResult((float(native_base_width(one.spec)),))
            for name, one in (("before", before), ("after", after))
        }

    monkeypatch.setattr(native_stage, "times_of", times_of)
    for target, width in ((2.0, 8), (1.5, 10), (16.0, 1)):
        recipe = PruneRecipe(layout="native", target_speedup=target)
        assert native_stage.fast_enough(decoder, 16, clip, recipe, SilentProgress()) == width
    with pytest.raises(SpecError, match=r"16\.00 times as fast"):
        native_stage.fast_enough(decoder, 16, clip, PruneRecipe(layout="native", target_speedup=17.0), SilentProgress())


def test_a_decoder_pruned_freely_is_refused() -> None:
    spec = original_spec()
    assert native_base_width(spec) == 4
    with pytest.raises(SpecError, match="not its original at another base width"):
        native_base_width(narrowed_spec(spec, kept_of(spec, ("up3",))))


def test_the_nearest_width_is_taken() -> None:
    assert nearest_base_width(16, 0.5, 1) == 8
    assert nearest_base_width(16, 0.6, 1) == 10
    assert nearest_base_width(16, 0.6, 4) == 8
    assert nearest_base_width(16, 0.01, 1) == 1


@pytest.mark.parametrize("given", [{"stage_keep_ratios": {"up3": 0.5}}, {"group_keep_ratios": {"up3.stream": 0.5}}])
def test_settings_that_the_native_layout_cannot_follow_are_refused(given: dict) -> None:
    with pytest.raises(ValidationError, match="native layout"):
        PruneRecipe(layout="native", **given)
