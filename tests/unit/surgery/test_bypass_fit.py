"""Pruning, converting and solving a decoder with bypasses."""

from __future__ import annotations

import pytest
import torch

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.groups import Kept, channel_groups
from flashvaed_cli.distill.features import run_with_features
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery.evidence import channel_evidence
from flashvaed_cli.surgery.layer_fit import FitSettings, LayerError
from flashvaed_cli.surgery.reconstruct import reconstruct_coder
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec, spec_of_widths
from flashvaed_cli.surgery.selection import select_channels
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.toy import WAN22_SPECS, kept_of, toy_decoder, toy_latents, wan22_spec

REFERENCE = toy_decoder(wan22_spec())
CLIPS = [toy_latents(3, 3, 3, seed=seed) for seed in range(3)]
HELD_OUT = toy_latents(3, 2, 2, seed=9)


def reconstruct(student: Decoder, kept: Kept, first_block: str, mode: str, frac: float = 1e-4) -> list[LayerError]:
    settings = FitSettings(mode=mode, dampening_frac=frac)  # type: ignore[arg-type]
    return reconstruct_coder(
        REFERENCE, student, kept, CLIPS, first_block=first_block, settings=settings, progress=SilentProgress()
    )


def error(student: Decoder) -> float:
    """Share of the variance of the held-out frames."""
    expected = decode(REFERENCE, HELD_OUT)
    return float((decode(student, HELD_OUT) - expected).square().mean() / expected.var())


@pytest.mark.parametrize("first_block", ["up0.2", "up2.0"])
def test_an_unchanged_decoder_is_returned_as_it_was(first_block: str) -> None:
    """Also where the solve begins inside a stage whose bypass is open. The ridge pulls to the weights as they are."""
    student = transfer_weights(REFERENCE, wan22_spec(), {})
    errors = reconstruct(student, {}, first_block, "full")
    assert max(line.after for line in errors) < 1e-6
    assert error(student) < 1e-6  # float32 products, solved layer after layer


def test_a_cut_bypass_carries_the_channels_that_both_ends_keep() -> None:
    kept = kept_of(wan22_spec(), ("up2", "up3"))
    student = transfer_weights(REFERENCE, narrowed_spec(wan22_spec(), kept), kept)
    x = toy_latents(1, 2, 2)[:, :1].expand(1, 16, 1, 2, 2).clone()
    lost = [i for i in range(16) if i not in kept["up1.3"]]
    x[:, lost] = 0
    whole = REFERENCE.bypasses["up2"].carried(x, is_first=True)  # type: ignore[operator]
    narrow = student.bypasses["up2"].carried(x[:, list(kept["up1.3"])], is_first=True)  # type: ignore[operator]
    torch.testing.assert_close(narrow, whole[:, list(kept["up2.3"])])


@pytest.mark.parametrize("mode", ["full", "channel"])
def test_solving_beats_the_cut(mode: str) -> None:
    kept = kept_of(wan22_spec(), ("up2", "up3"))
    student = transfer_weights(REFERENCE, narrowed_spec(wan22_spec(), kept), kept)
    cut = error(student)
    lines = {line.address: line for line in reconstruct(student, kept, "up1.3", mode)}
    assert error(student) < 0.8 * cut
    assert lines["up2.3.bypass"].after < 0.9 * lines["up2.3.bypass"].before
    assert lines["up2.3.bypass"].num_unknowns == 12 + 1


def test_solving_beats_the_conversion() -> None:
    student = transfer_weights(REFERENCE, converted_spec(wan22_spec(), {"up3": "frame2d"}), {})
    before = error(student)
    reconstruct(student, {}, "up3.0", "full")
    assert error(student) < 0.75 * before


def test_the_upsampler_makes_up_for_what_the_bypass_lost() -> None:
    """Without the copies of half of its channels the stage's output is solved for, not the upsampler's alone."""
    kept = {"up2.3": (0, 1, 2, 5)}
    student = transfer_weights(REFERENCE, narrowed_spec(wan22_spec(), kept), kept)
    student.bypasses["up2"].conv.weight.zero_()  # type: ignore[union-attr, operator]
    before = error(student)
    reconstruct(student, kept, "up2.3", "full")
    assert error(student) < 0.7 * before


def test_statistics_are_of_the_sum_that_leaves_a_stage() -> None:
    statistics = collect_statistics(REFERENCE, CLIPS, num_clips=3, progress=SilentProgress())
    outputs = [dict(REFERENCE.walk(clip))["up2.3"] for clip in CLIPS]
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in outputs], dim=1).double()
    torch.testing.assert_close(statistics["up2.3"].mean, values.mean(1), rtol=1e-5, atol=1e-6)
    _, features = run_with_features(REFERENCE, CLIPS[0], ["up2.3"])
    torch.testing.assert_close(features["up2.3"], outputs[0])


def test_every_rule_knows_what_a_bypass_reads_and_writes() -> None:
    pruned = toy_decoder(WAN22_SPECS["pruned"])
    statistics = collect_statistics(pruned, CLIPS, num_clips=3, progress=SilentProgress())
    groups = {group.name: group for group in channel_groups(pruned.spec)}
    written = channel_evidence(pruned, groups["up3.entry"], statistics).producer_l1
    assert written is not None
    layers = pruned.at("up2.3.spatial").get_parameter("weight"), pruned.at("up2.3.bypass").get_parameter("weight")
    expected = layers[0].abs().flatten(1).sum(1) + layers[1].abs().view(6, -1).sum(1)
    torch.testing.assert_close(written, expected.double())
    for rule in ("greedy-energy", "next-layer", "l1"):
        kept, _ = select_channels(pruned, statistics, {"up2": 0.5, "up3": 0.5}, rule=rule)
        twice = transfer_weights(pruned, narrowed_spec(pruned.spec, kept), kept)
        assert decode(twice, HELD_OUT).shape == (1, 3, 9, 32, 32)


def test_widths_move_the_bypass_along() -> None:
    spec = spec_of_widths(wan22_spec(), {"up2.entry": 8})
    assert [stage.bypass.conv is None for stage in spec.stages if stage.bypass] == [True, False, False]
    assert spec.stage("up2").bypass is not None and spec.stage("up2").bypass.in_width == 8  # type: ignore[union-attr]
