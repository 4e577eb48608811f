"""Pruning and least squares on light decoders, whose blocks have no norms: exact where channels repeat others."""

from __future__ import annotations

import pytest
import torch

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.spec.groups import Kept, channel_groups, consumers, producers
from flashvaed_cli.decoders.spec.light import LightShape
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.reconstruct import first_changed_block, reconstruct_coder
from flashvaed_cli.surgery.respec import narrowed_spec
from flashvaed_cli.surgery.selection import select_channels
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.light_toy import SHAPES, WIDTH, light_toy
from tests.toy import toy_latents

CLIPS = [toy_latents(4, 4, 4, seed=seed) for seed in range(3)]
HELD_OUT = toy_latents(4, 4, 4, seed=99)


def doubled_channels(reference: Decoder, tensors: list[str]) -> Decoder:
    """Make channel 2i + 1 of inner layers a copy of channel 2i."""
    for tensor in tensors:
        layer = reference.at(tensor)
        assert isinstance(layer, Conv)
        layer.weight[1::2] = layer.weight[::2]
        layer.bias[1::2] = layer.bias[::2]
    return reference


@torch.no_grad()
def missed(student: Decoder, reference: Decoder) -> float:
    target = reference(HELD_OUT)
    return float((student(HELD_OUT) - target).square().mean() / target.var())


def inner_tensors(decoder: Decoder, stage: str) -> list[str]:
    return [tensor for group in channel_groups(decoder.spec) if ".inner" in group.name and group.stage == stage
            for tensor in group.tensors]  # fmt: skip


def solved(reference: Decoder, kept: Kept, settings: FitSettings) -> tuple[Decoder, Decoder]:
    """The narrower decoder as it was cut, and after least squares."""
    spec = narrowed_spec(reference.spec, kept)
    cut, student = (transfer_weights(reference, spec, kept) for _ in range(2))
    first = first_changed_block(reference, student)
    assert first is not None
    reconstruct_coder(reference, student, kept, CLIPS, first_block=first, settings=settings, progress=SilentProgress())
    return cut, student


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["full", "channel"])
def test_inner_channels_that_repeat_others_cost_nothing(shape: LightShape, mode: str) -> None:
    reference = light_toy(shape)
    tensors = inner_tensors(reference, "up1")
    assert len(tensors) == {"tae": 6, "temporal-tae": 4, "efficientvit": 10}[shape]
    doubled_channels(reference, tensors)
    kept = dict.fromkeys(tensors, tuple(range(0, WIDTH, 2)))
    cut, student = solved(reference, kept, FitSettings(mode=mode, dampening_frac=1e-9))  # type: ignore[arg-type]
    assert missed(cut, reference) > 1e-4
    assert missed(student, reference) < 1e-6  # float32 products


@pytest.mark.parametrize("shape", SHAPES)
def test_streams_are_narrowed_and_refitted(shape: LightShape) -> None:
    reference = light_toy(shape)
    statistics = collect_statistics(reference, CLIPS, num_clips=None, progress=SilentProgress())
    ratios = {group.name: 0.75 for group in channel_groups(reference.spec) if group.stage in ("up2", "up3")}
    kept, _ = select_channels(reference, statistics, ratios, rule="greedy-energy")
    cut, student = solved(reference, kept, FitSettings())
    narrowed = dict(student.spec.blocks())["up2.1"]
    assert narrowed.in_width == 0.75 * WIDTH and "shortcut" in narrowed.layers
    assert missed(student, reference) < 0.5 * missed(cut, reference)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unchanged_light_decoder_keeps_its_frames_under_least_squares(shape: LightShape) -> None:
    reference = light_toy(shape)
    student = transfer_weights(reference, reference.spec, {})
    reconstruct_coder(
        reference, student, {}, CLIPS, first_block="conv_in.0", settings=FitSettings(), progress=SilentProgress()
    )
    assert missed(student, reference) < 1e-6


def test_groups_of_a_chain_name_their_neighbours() -> None:
    spec = light_toy("tae").spec
    groups = {group.name: group for group in channel_groups(spec)}
    assert {"conv_in.stream", "up0.0.inner", "up0.0.inner2", "up0.stream"} - set(groups) == {"conv_in.stream"}
    (first,), (second,) = (consumers(spec, groups[name]) for name in ("up0.0.inner", "up0.0.inner2"))
    assert (first.layer, first.norm) == ("up0.0.conv2", None) and (second.layer, second.norm) == ("up0.0.conv3", None)
    assert producers(spec, groups["up0.0.inner2"]) == ["up0.0.conv2"]
