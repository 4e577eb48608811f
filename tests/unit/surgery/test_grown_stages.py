"""Surgery on SeedVR2's stages of a shuffle and the layer on the grown frames, which residual blocks follow."""

from __future__ import annotations

import pytest
import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import Kept, channel_groups, consumers, producers
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.families.seedvr2.spec import seedvr2_decoder_spec
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.reconstruct import reconstruct_coder
from flashvaed_cli.surgery.respec import converted_spec, main_layers, narrowed_spec
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.toy import kept_of, toy_decoder, toy_latents

SPEC = seedvr2_decoder_spec(4, 16)
CLIPS = [toy_latents(3, 4, 5, seed=seed).repeat(1, 4, 1, 1, 1) for seed in range(3)]
HELD_OUT = toy_latents(3, 4, 5, seed=99).repeat(1, 4, 1, 1, 1)


@torch.no_grad()
def squared_error(student: Decoder, reference: Decoder) -> float:
    """Share of the frames' variance that the student misses on fresh latents."""
    target = reference(HELD_OUT)
    return float((student(HELD_OUT) - target).square().mean() / target.var())


def fitted(
    reference: Decoder, spec: DecoderSpec, kept: Kept, first_block: str, mode: str = "full"
) -> tuple[Decoder, set[str]]:
    student = transfer_weights(reference, spec, kept)
    errors = reconstruct_coder(
        reference,
        student,
        kept,
        CLIPS,
        first_block=first_block,
        settings=FitSettings(mode=mode),  # type: ignore[arg-type]
        progress=SilentProgress(),
    )
    return student, {error.address for error in errors}


def test_the_grown_frames_are_a_group() -> None:
    groups = {group.name: group for group in channel_groups(SPEC)}
    grown = groups["up2_grown.stream"]
    assert grown.tensors == ("up2_grown.0",) and grown.width == groups["up2.stream"].width
    assert producers(SPEC, grown) == ["up2_grown.0.conv"]
    assert [one.layer for one in consumers(SPEC, grown)] == ["up2_grown.1.conv"]
    assert {"up2_grown", "up2", "up3"} == set(get_family("seedvr2").shallow_stages)


def test_main_layers() -> None:
    assert [(address, main) for address, (_, main) in main_layers(SPEC.stage("up0_grown")).items()] == [
        ("up0_grown.1", ("conv",))
    ]
    assert set(main_layers(SPEC.stage("up0"))) == {"up0.0", "up0.1", "up0.2"}
    assert not main_layers(SPEC.stage("conv_in")) and not main_layers(SPEC.stage("head"))


def test_paper_layout() -> None:
    layers = dict(converted_spec(SPEC, get_family("seedvr2").paper_operators).layers())
    assert [layers[f"up{i}_grown.1.conv"].operator for i in range(3)] == ["dwsep3d", "dwsep3d", "frame2d"]
    assert [layers[f"up{i}_grown.0.conv"].operator for i in range(3)] == ["pointwise"] * 3
    assert layers["conv_in.0.conv"].operator == layers["head.0.conv"].operator == "causal3d"


@pytest.mark.parametrize("mode", ["full", "channel"])
def test_pruning_between_shuffle_and_layer_is_made_up_for(mode: str) -> None:
    reference = toy_decoder(SPEC)
    kept = kept_of(SPEC, ("up2_grown",))
    assert set(kept) == {"up2_grown.0"}
    spec = narrowed_spec(SPEC, kept)
    cut = squared_error(transfer_weights(reference, spec, kept), reference)
    student, solved = fitted(reference, spec, kept, "up2_grown.0", mode)
    assert {"up2_grown.0.conv", "up2_grown.1.conv"} <= solved
    assert squared_error(student, reference) < 0.6 * cut


def test_a_channel_that_nothing_reads_can_go() -> None:
    """The frames stay, whatever is fitted."""
    reference = toy_decoder(SPEC)
    layer = reference.get_parameter("stages.up2_grown.1.conv.weight")
    with torch.no_grad():
        layer[:, -1] = 0
    width = layer.shape[1]
    kept = {"up2_grown.0": tuple(range(width - 1))}
    spec = narrowed_spec(SPEC, kept)
    assert squared_error(transfer_weights(reference, spec, kept), reference) < 1e-10
    student, _ = fitted(reference, spec, kept, "up2_grown.0")
    assert squared_error(student, reference) < 1e-4


def test_converted_layers_are_fitted() -> None:
    reference = toy_decoder(SPEC)
    spec = converted_spec(SPEC, {"up1_grown": "dwsep3d", "up2_grown": "frame2d"})
    plain = squared_error(transfer_weights(reference, spec, {}), reference)
    student, solved = fitted(reference, spec, {}, "up1_grown.1")
    assert {"up1_grown.1.conv", "up2_grown.1.conv"} <= solved
    assert squared_error(student, reference) < 0.8 * plain
