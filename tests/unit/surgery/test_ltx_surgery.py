"""Surgery on LTX-Video: norms without gain, shuffles with and without residual, shortcuts behind a norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import ResBlockSpec, ShuffleUpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.groups import Kept, channel_groups, consumers, producers
from flashvaed_cli.distill.phases import gradient_masks, plan_phase_2
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery import layer_fit
from flashvaed_cli.surgery.layer_fit import FitSettings, LayerError
from flashvaed_cli.surgery.reconstruct import reconstruct_coder
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec
from flashvaed_cli.surgery.selection import select_channels
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.ltx_toy import VERSIONS, ltx_decoder, ltx_spec
from tests.toy import toy_latents

CLIPS = [toy_latents(3, 4, 5, seed=seed) for seed in range(4)]
HELD_OUT = toy_latents(3, 4, 5, seed=99)


def short_spec(version: str, *, causal: bool = False) -> DecoderSpec:
    """The entry, one block of every stage behind its resampler, the head: few unknowns, all kinds of blocks."""
    spec = ltx_spec(version, causal=causal)
    stages = []
    for stage in spec.stages:
        leads = [i for i, block in enumerate(stage.blocks) if isinstance(block, ShuffleUpsampleSpec)]
        stages.append(StageSpec(name=stage.name, blocks=stage.blocks[: (leads[-1] + 2 if leads else 1)]))
    return DecoderSpec(**{**dict(spec), "stages": tuple(stages)})


def reconstruct(
    reference: Decoder, student: Decoder, kept: Kept, first_block: str, settings: FitSettings
) -> list[LayerError]:
    return reconstruct_coder(
        reference, student, kept, CLIPS, first_block=first_block, settings=settings, progress=SilentProgress()
    )


@torch.no_grad()
def squared_error(student: Decoder, reference: Decoder) -> float:
    """Share of the frames' variance that the student misses, on latents that no fit has seen."""
    target: Tensor = reference(HELD_OUT)
    return float((student(HELD_OUT) - target).square().mean() / target.var())


@pytest.mark.parametrize("causal", [False, True], ids=["centred", "causal"])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_unchanged_decoder_keeps_its_frames(version: str, causal: bool) -> None:
    reference = ltx_decoder(short_spec(version, causal=causal))
    student = transfer_weights(reference, reference.spec, {})
    assert squared_error(student, reference) == 0
    errors = reconstruct(reference, student, {}, "up2.0", FitSettings(dampening_frac=1e-6))
    assert {error.address.split(".")[0] for error in errors} >= {"up2", "head"}
    assert all(error.after < 1e-5 for error in errors)  # float32 products
    assert squared_error(student, reference) < 1e-4  # which norms over four channels stretch


@pytest.mark.parametrize("mode", ["full", "channel"])
@pytest.mark.parametrize("version", VERSIONS[:2])
def test_reconstruction_improves_on_the_cut(version: str, mode: str) -> None:
    """What the rule keeps of the shallow stages, the last as 2D: the paper's layout for them."""
    reference = ltx_decoder(short_spec(version))
    shallow = [stage.name for stage in reference.spec.stages if stage.name.startswith("up")][-2:]
    statistics = collect_statistics(reference, CLIPS, num_clips=None, progress=SilentProgress())
    kept, _ = select_channels(reference, statistics, dict.fromkeys(shallow, 0.75), rule="greedy-r2")
    spec = converted_spec(narrowed_spec(reference.spec, kept), {shallow[-1]: "frame2d"})
    assert all(block.norm.gain for _, block in spec.blocks() if isinstance(block, ResBlockSpec) and block.shortcut)
    student = transfer_weights(reference, spec, kept)
    cut = squared_error(student, reference)
    reconstruct(reference, student, kept, f"{shallow[0]}.0", FitSettings(mode=mode))  # type: ignore[arg-type]
    assert squared_error(student, reference) < 0.75 * cut


def test_a_residual_becomes_part_of_the_kernel() -> None:
    """As pruning does it, but with all channels kept: the same frames."""
    for causal in (True, False):
        reference = ltx_decoder(short_spec(VERSIONS[1], causal=causal))
        shuffles = {a: b for a, b in reference.spec.blocks() if isinstance(b, ShuffleUpsampleSpec)}
        assert len(shuffles) == 3 and all(block.residual for block in shuffles.values())
        changed = {address: block.model_copy(update={"residual": False}) for address, block in shuffles.items()}
        student = transfer_weights(reference, reference.spec.with_blocks(changed), {})  # type: ignore[arg-type]
        with torch.no_grad():
            assert (student(HELD_OUT) - reference(HELD_OUT)).abs().max() < 1e-5


def test_groups_of_a_stage_that_a_resampler_leads() -> None:
    """What enters the resampler has channels of its own; what leaves it belongs to the stream."""
    spec = ltx_spec(VERSIONS[0])
    groups = {group.name: group for group in channel_groups(spec)}
    assert groups["up2.entry"].tensors == ("up2.0",)
    assert groups["up2.stream"].tensors == tuple(f"up2.{i}" for i in range(1, 5))
    assert groups["up1.stream"].tensors == tuple(f"up1.{i}" for i in range(4))
    assert producers(spec, groups["up2.stream"])[0] == "up2.1.conv"
    assert [reader.layer for reader in consumers(spec, groups["up2.entry"])] == ["up2.1.conv"]
    # The next stage's first block changes the width: a norm of its own stands before the shortcut.
    shortcuts = [c for c in consumers(spec, groups["up2.stream"]) if c.layer == "up3.0.shortcut"]
    assert [reader.norm for reader in shortcuts] == ["up3.0.shortcut_norm"]


def test_phase_2_holds_all_rows_of_a_shuffled_channel() -> None:
    decoder = ltx_decoder(short_spec(VERSIONS[0]))
    group = next(group for group in channel_groups(decoder.spec) if group.name == "up2.stream")
    plan = plan_phase_2(decoder.spec, decoder.spec, to_keep=dict.fromkeys(group.tensors, (1,)))
    mask = gradient_masks(decoder, plan)["stages.up2.1.conv.weight"].flatten()
    assert mask.nonzero().flatten().tolist() == list(range(8, 16))


@pytest.mark.parametrize("version", VERSIONS)
def test_layers_too_large_to_solve_are_measured_with_their_own_padding(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unchanged decoder misses nothing."""
    monkeypatch.setattr(layer_fit, "MAX_UNCHANGED_FEATURES", 1)
    reference = ltx_decoder(short_spec(version))
    student = transfer_weights(reference, reference.spec, {})
    errors = reconstruct(reference, student, {}, "up1.0", FitSettings())
    measured = [error for error in errors if error.num_unknowns == 0]
    assert len(measured) > 4 and max(error.after for error in measured) < 1e-8  # float32 in two orders
