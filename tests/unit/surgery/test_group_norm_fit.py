"""Pruning under GroupNorm: dead groups go without a trace, and least squares makes up for others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.numerics.selection import SELECTION_RULES
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.reconstruct import first_changed_block, reconstruct_coder
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec
from flashvaed_cli.surgery.selection import select_channels
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.toy import kept_of, toy_decoder, toy_latents

FAMILY = get_family("sdxl")
SPEC = FAMILY.decoder_spec(8, 4)
CLIPS = [toy_latents(3, 4, 5, seed=seed) for seed in range(4)]
HELD_OUT = toy_latents(3, 4, 5, seed=99)
STAGES = ("up2", "up3")


@torch.no_grad()
def missed(student: Decoder, reference: Decoder, latents: Tensor = HELD_OUT) -> float:
    target = reference(latents)
    return float((student(latents) - target).square().mean() / target.var())


def fitted(
    reference: Decoder,
    student: Decoder,
    kept: dict[str, tuple[int, ...]],
    mode: str = "full",
    clips: list[Tensor] | None = None,
) -> Decoder:
    first = first_changed_block(reference, student)
    assert first is not None
    settings = FitSettings(mode=mode)  # type: ignore[arg-type]
    reconstruct_coder(
        reference, student, kept, clips or CLIPS, first_block=first, settings=settings, progress=SilentProgress()
    )
    return student


@torch.no_grad()
def with_dead_runs(decoder: Decoder, stage: str) -> tuple[Decoder, dict[str, tuple[int, ...]]]:
    """A decoder in which every second run of the insides of a stage is zero, and the channels that are not."""
    kept = {}
    for group in channel_groups(decoder.spec):
        if group.stage != stage or not group.name.endswith(".inner"):
            continue
        address = group.tensors[0].rpartition(".")[0]
        dead = torch.tensor([i for i in range(group.width) if i // group.run % 2])
        block = decoder.at(address)
        for values in (block.conv1.weight, block.conv1.bias, block.norm2.beta):  # type: ignore[union-attr]
            values[dead] = 0.0  # type: ignore[index]
        kept[group.tensors[0]] = tuple(i for i in range(group.width) if not i // group.run % 2)
    return decoder, kept


def test_dead_groups_go_without_a_trace() -> None:
    reference, kept = with_dead_runs(toy_decoder(SPEC), "up2")
    student = transfer_weights(reference, narrowed_spec(SPEC, kept), kept)
    with torch.no_grad():
        assert torch.allclose(student(HELD_OUT), reference(HELD_OUT), atol=1e-5)
    assert missed(fitted(reference, student, kept), reference) < 1e-6


@pytest.mark.parametrize(("mode", "share"), [("full", 0.5), ("channel", 0.7)])
def test_least_squares_makes_up_for_channels_that_go(mode: str, share: float) -> None:
    reference, kept = toy_decoder(SPEC), kept_of(SPEC, ("up2",))
    cut = transfer_weights(reference, narrowed_spec(SPEC, kept), kept)
    before = missed(cut, reference)
    after = missed(fitted(reference, cut, kept, mode), reference)
    assert after < share * before


def test_attention_is_fitted_behind_its_group_norm() -> None:
    reference, kept = toy_decoder(SPEC), kept_of(SPEC, ("mid",))
    cut = transfer_weights(reference, narrowed_spec(SPEC, kept), kept)
    before = missed(cut, reference)
    clips = [toy_latents(3, 10, 10, seed=seed) for seed in range(8)]  # ten positions for each of the 300 unknowns
    after = missed(fitted(reference, cut, kept, clips=clips), reference)
    print(before, after)
    assert after < 0.5 * before


def test_separable_layers_are_fitted_behind_group_norms() -> None:
    reference = toy_decoder(SPEC)
    student = transfer_weights(reference, converted_spec(SPEC, {"up1": "dwsep3d"}), {})
    before = missed(student, reference)
    assert missed(fitted(reference, student, {}), reference) < 0.7 * before


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_every_rule_keeps_whole_groups(rule: str) -> None:
    reference = toy_decoder(SPEC)
    statistics = collect_statistics(reference, CLIPS, num_clips=None, progress=SilentProgress())
    kept, report = select_channels(reference, statistics, dict.fromkeys(STAGES, 0.3), rule=rule)
    narrowed_spec(SPEC, kept)  # which refuses anything else
    runs = {group.name: group.run for group in channel_groups(SPEC)}
    assert all(len(one.kept) == max(round(0.3 * one.width / runs[one.group]), 1) * runs[one.group] for one in report)
    assert set(runs.values()) == {1, 2, 4}
