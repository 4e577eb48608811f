"""Surgery on HunyuanVideo 1.5: resamplers whose copies become part of a kernel, and a layer for first frames."""

from __future__ import annotations

import pytest
import torch

from flashvaed_cli.artifact.foreign.coders import coders_from_foreign
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import BlockSpec, CellUpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.families.hunyuanvideo15.names import HUNYUAN_15_DIFFUSERS, HUNYUAN_15_ORIGINAL
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.reconstruct import reconstruct_coder
from flashvaed_cli.surgery.respec import narrowed_spec
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.hunyuan15_toy import hunyuan15_spec, pruned_hunyuan15_spec
from tests.toy import kept_of, toy_decoder, toy_latents

CLIPS = [toy_latents(3, 4, 5, seed=seed) for seed in range(4)]
HELD_OUT = toy_latents(3, 4, 5, seed=99)


def short_spec() -> DecoderSpec:
    """The entry, one residual block of the first two stages, their resamplers, the head: few unknowns."""
    spec = hunyuan15_spec()
    stages = {stage.name: stage.blocks for stage in spec.stages}
    blocks = {
        "conv_in": stages["conv_in"],
        "up0": stages["up0"][-2:],
        "up1": stages["up1"][-2:],
        "up2": stages["up2"][-2:],
        "up3": stages["up3"][-2:],
        "head": stages["head"],
    }
    bypass = spec.stage("conv_in").bypass
    found = (
        StageSpec(name=name, blocks=one, bypass=bypass if name == "conv_in" else None) for name, one in blocks.items()
    )
    return DecoderSpec(**{**dict(spec), "stages": tuple(found)})


@torch.no_grad()
def squared_error(student: Decoder, reference: Decoder, *, first: bool = False) -> float:
    """Share of the frames' variance that the student misses on fresh latents; `first`: of the first frames'."""
    frames = slice(0, 1 if first else None)
    target = reference(HELD_OUT)[:, :, frames]
    return float((student(HELD_OUT)[:, :, frames] - target).square().mean() / target.var())


def without_residuals(spec: DecoderSpec) -> DecoderSpec:
    """As pruning makes them, but with all channels."""
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        if isinstance(block, CellUpsampleSpec):
            ft = block.factor[0]
            first = point_conv(block.conv.in_width, block.conv.out_width // ft) if ft > 1 else None
            update = {"residual": False, "first": first}
            changed[address] = CellUpsampleSpec(**{**dict(block), **update})
    return spec.with_blocks(changed)


def test_a_residual_becomes_part_of_the_kernel() -> None:
    reference = toy_decoder(hunyuan15_spec()).double()
    student = transfer_weights(reference, without_residuals(reference.spec), {}).double()
    with torch.no_grad():
        assert (student(HELD_OUT.double()) - reference(HELD_OUT.double())).abs().max() < 1e-6
    twice = transfer_weights(student, student.spec, {}).double()
    assert torch.equal(twice(HELD_OUT.double()), student(HELD_OUT.double()))


@pytest.mark.parametrize("mode", ["full", "channel"])
def test_an_unchanged_decoder_keeps_its_frames(mode: str) -> None:
    for spec in (short_spec(), without_residuals(short_spec())):
        reference = toy_decoder(spec)
        student = transfer_weights(reference, reference.spec, {})
        assert squared_error(student, reference) == 0
        settings, silent = FitSettings(mode=mode, dampening_frac=1e-6), SilentProgress()  # type: ignore[arg-type]
        errors = reconstruct_coder(
            reference, student, {}, CLIPS, first_block="up0.0", settings=settings, progress=silent
        )
        assert {"up0.1.conv", "up3.1.conv"} <= {error.address for error in errors}
        assert all(error.after < 1e-5 for error in errors)
        assert squared_error(student, reference) < 1e-4 and squared_error(student, reference, first=True) < 1e-4


@pytest.mark.parametrize("mode", ["full", "channel"])
def test_reconstruction_improves_on_the_cut(mode: str) -> None:
    """In the first frame too, which has a layer of its own."""
    reference = toy_decoder(short_spec())
    kept = kept_of(reference.spec, ("up0", "up1", "up2", "up3"))
    student = transfer_weights(reference, narrowed_spec(reference.spec, kept), kept)
    cut = [squared_error(student, reference, first=first) for first in (False, True)]
    settings = FitSettings(mode=mode)  # type: ignore[arg-type]
    errors = reconstruct_coder(
        reference, student, kept, CLIPS, first_block="conv_in.0", settings=settings, progress=SilentProgress()
    )
    fits = {error.address: error for error in errors}
    assert {"up0.1.first", "up1.1.first"} <= set(fits) and "up2.1.first" not in fits
    assert fits["up1.1.first"].after < fits["up1.1.first"].before
    found = [squared_error(student, reference, first=first) for first in (False, True)]
    assert found[0] < 0.8 * cut[0] and found[1] < cut[1]


@pytest.mark.parametrize("layout", [HUNYUAN_15_ORIGINAL, HUNYUAN_15_DIFFUSERS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("is_still", [False, True])
def test_pruned_decoders_are_written_and_read(layout, is_still: bool) -> None:
    decoder = toy_decoder(pruned_hunyuan15_spec())
    decoder = still_decoder(decoder) if is_still else decoder
    tensors = to_program([(decoder.state_dict(), decoder.spec)], layout, ((), ()))
    config = get_family(decoder.spec.family).described(decoder.spec)
    assert config == {"decoder_upsample_residual": [False] * 4}
    again = coders_from_foreign(tensors, layout, config=config)["decoder"]
    assert again.spec == decoder.spec
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), decoder.parameters(), strict=True))
