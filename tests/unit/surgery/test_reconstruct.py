"""Closed-form reconstruction on decoders whose exact answer is known, and on one whose is not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import HeadSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.groups import Kept, compose_kept
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.variants.expansion import expanded_decoder
from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery import layer_fit
from flashvaed_cli.surgery.layer_fit import FitSettings, LayerError
from flashvaed_cli.surgery.reconstruct import first_changed_block, reconstruct_coder
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec, with_time_rank
from flashvaed_cli.surgery.selection import select_channels
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.toy import DECODER_SPECS, LATENT_WIDTH, kept_of, original_spec, toy_decoder, toy_latents

CLIPS = [toy_latents(seed=seed) for seed in range(4)]
HELD_OUT = toy_latents(seed=99)
# A ridge that does not show: what can be exact is, to float32 products.
NEARLY_EXACT = FitSettings(dampening_frac=1e-9)


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Everything temporary goes below `tmp_path`, and nothing may be left there, whatever happened."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def reconstruct(
    reference: Decoder,
    student: Decoder,
    kept: Kept,
    first_block: str,
    *,
    clips: list[Tensor] | None = None,
    settings: FitSettings = NEARLY_EXACT,
) -> list[LayerError]:
    return reconstruct_coder(
        reference,
        student,
        kept,
        CLIPS if clips is None else clips,
        first_block=first_block,
        settings=settings,
        progress=SilentProgress(),
    )


@torch.no_grad()
def squared_error(student: Decoder, reference: Decoder, latents: Tensor = HELD_OUT) -> float:
    """Share of the frames' variance that the student misses, on latents that no fit has seen."""
    target = reference(latents)
    return float((student(latents) - target).square().mean() / target.var())


def greedily_kept(reference: Decoder, keep_ratios: dict[str, float]) -> Kept:
    statistics = collect_statistics(reference, CLIPS, num_clips=None, progress=SilentProgress())
    kept, _ = select_channels(reference, statistics, keep_ratios, rule="greedy-r2")
    return kept


@pytest.mark.parametrize(("changed", "runs_per_clip"), [(None, 1), ("up0.0", 2)])
def test_what_comes_before_the_first_solved_block_runs_once_for_both(
    monkeypatch: pytest.MonkeyPatch, changed: str | None, runs_per_clip: int
) -> None:
    reference = toy_decoder()
    student = transfer_weights(reference, reference.spec, {})
    if changed is not None:
        next(student.at(changed).parameters()).mul_(1.5)
    walk, stops = Decoder.walk, []

    def counted(self: Decoder, *args: object, stop: str | None = None, **options: object) -> object:
        stops.append(stop)
        return walk(self, *args, stop=stop, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "walk", counted)
    reconstruct(reference, student, {}, "up1.0")
    assert stops.count("up1.0") == runs_per_clip * len(CLIPS)


def test_an_unchanged_decoder_keeps_its_frames() -> None:
    reference = toy_decoder()
    student = transfer_weights(reference, reference.spec, {})
    errors = reconstruct(reference, student, {}, "up2.0")
    assert [error.address for error in errors] == [
        *[f"up2.{i}.conv{j}" for i in range(3) for j in (1, 2)],
        "up2.3.spatial",
        *[f"up3.{i}.conv{j}" for i in range(3) for j in (1, 2)],
        "head.0.conv",
    ]
    assert all(error.before < 1e-5 and error.after < 1e-5 for error in errors)  # float32 products
    assert squared_error(student, reference) < 1e-6


def short_spec() -> DecoderSpec:
    """One block of each kind, of few unknowns, and two doublings less."""
    spec = wan_decoder_spec(2, LATENT_WIDTH)
    kept = {"post_quant": (0,), "conv_in": (0,), "mid": (0, 1), "up0": (3,), "up1": (0,)}
    stages = [StageSpec(name=name, blocks=tuple(spec.stage(name).blocks[i] for i in kept[name])) for name in kept]
    head = HeadSpec(conv=ConvSpec(operator="causal3d", in_width=8, out_width=3, kernel=(3, 3, 3)))
    stages.append(StageSpec(name="head", blocks=(head,)))
    return DecoderSpec(family=spec.family, stages=tuple(stages), temporal_factor=2, spatial_factor=2)


def test_every_kind_of_block_is_solved_back() -> None:
    """All layers of the original forgotten: enough data gives them back."""
    reference = toy_decoder(short_spec())
    student = transfer_weights(reference, reference.spec, {})
    for name, parameter in student.named_parameters():
        parameter.copy_(torch.ones_like(parameter) if name.endswith("gamma") else 0.1 * torch.randn_like(parameter))
    clips = [toy_latents(4, 6, 6, seed=seed) for seed in range(4)]
    errors = reconstruct(reference, student, {}, "post_quant.0", clips=clips)
    addresses = [error.address for error in errors]
    assert {"post_quant.0.conv", "conv_in.0.conv", "up0.0.temporal", "up1.0.conv2 + up1.0.shortcut"} <= set(addresses)
    assert all(error.num_rows > 2 * error.num_unknowns for error in errors)
    assert all(error.after < 1e-5 < error.before for error in errors)
    assert squared_error(student, reference) < 1e-6


def test_frame2d_from_only_the_last_tap_is_exact() -> None:
    reference = toy_decoder()
    for name, parameter in reference.named_parameters():
        if name.startswith("stages.up3.") and parameter.ndim == 5:
            parameter[:, :, :-1] = 0.0
    student = transfer_weights(reference, converted_spec(reference.spec, {"up3": "frame2d"}), {})
    for index in range(3):
        student.get_parameter(f"stages.up3.{index}.conv1.weight").mul_(0.5)
    assert squared_error(student, reference) > 1e-3
    errors = reconstruct(reference, student, {}, "up3.0")
    assert all(error.after < 1e-5 for error in errors)
    assert squared_error(student, reference) < 1e-6


def test_separable_kernels_are_recovered() -> None:
    reference = toy_decoder()
    generator = torch.Generator().manual_seed(1)
    for name, weight in reference.named_parameters():
        if name.startswith("stages.up2.") and weight.ndim == 5:
            depthwise = torch.randn(weight.shape[1:], generator=generator) / 27**0.5
            weight.copy_(torch.einsum("oc,cthw->octhw", weight[:, :, 0, 0, 0] * 27**0.5, depthwise))
    student = transfer_weights(reference, converted_spec(reference.spec, {"up2": "dwsep3d"}), {})
    for name, parameter in student.named_parameters():
        if name.endswith("depthwise"):
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    cut = squared_error(student, reference)
    settings = FitSettings(dampening_frac=1e-9, num_separable_iterations=10)
    errors = reconstruct(reference, student, {}, "up2.0", settings=settings)
    assert all(error.after < 1e-5 for error in errors)
    assert cut > 1e-3
    assert squared_error(student, reference) < 1e-6


def duplicate_channels_(decoder: Decoder, stage: str, source: str) -> None:
    """Make the second half of the stage's channels, stream and insides, a copy of the first."""
    layers = [f"{source}.spatial", *[f"{stage}.{i}.conv{j}" for i in range(3) for j in (1, 2)]]
    for address in layers:
        for name in ("weight", "bias"):
            parameter = decoder.get_parameter(f"stages.{address}.{name}")
            half = parameter.shape[0] // 2
            parameter[half:] = parameter[:half]
    for index in range(3):
        for name in ("norm1", "norm2"):
            gamma = decoder.get_parameter(f"stages.{stage}.{index}.{name}.gamma")
            gamma[len(gamma) // 2 :] = gamma[: len(gamma) // 2]


def test_redundant_channels_cost_nothing() -> None:
    """Half of up2 copies the other half: what is cut can be made up for exactly.

    Copies, because norm and SiLU leave them copies; other combinations would not stay linear.
    """
    reference = toy_decoder()
    duplicate_channels_(reference, "up2", "up1.3")
    kept = greedily_kept(reference, {"up2": 0.5})
    assert {tuple(sorted(i % 4 for i in channels)) for channels in kept.values()} == {(0, 1, 2, 3)}
    student = transfer_weights(reference, narrowed_spec(reference.spec, kept), kept)
    cut = squared_error(student, reference)
    errors = reconstruct(reference, student, kept, "up1.3")
    assert all(error.after < 1e-5 for error in errors)
    assert cut > 0.1
    assert squared_error(student, reference) < 1e-6


@pytest.mark.parametrize("convert", [False, True])
def test_the_fit_beats_the_cut_on_latents_it_has_not_seen(convert: bool) -> None:
    reference = toy_decoder()
    kept = greedily_kept(reference, {"up2": 0.5, "up3": 0.75})
    spec = narrowed_spec(reference.spec, kept)
    if convert:
        spec = converted_spec(spec, {"up2": "frame2d", "up3": "frame2d"})
    student = transfer_weights(reference, spec, kept)
    cut = squared_error(student, reference)
    first = first_changed_block(reference, student)
    assert first == "up1.3"
    errors = reconstruct(reference, student, kept, first, settings=FitSettings(dampening_frac=1e-6))
    # The least squares minimises error plus ridge: where nothing is left to gain the ridge may show.
    assert all(error.after <= error.before + 1e-6 for error in errors)
    fitted = squared_error(student, reference)
    assert fitted < 0.5 * cut  # PSNR up by at least 3 dB
    assert all(error.num_rows > error.num_unknowns for error in errors)


def test_a_second_pruning_is_solved_against_the_original() -> None:
    """The prefix of the second student is narrower than the original's."""
    original = toy_decoder()
    first_kept = kept_of(original.spec, ("up2",))
    once = transfer_weights(original, narrowed_spec(original.spec, first_kept), first_kept)
    second_kept = {"up2.2.conv1": (0, 2, 5)}
    twice = transfer_weights(once, narrowed_spec(once.spec, second_kept), second_kept)
    first = first_changed_block(once, twice)
    assert first == "up2.2"
    cut = squared_error(twice, original)
    errors = reconstruct(original, twice, compose_kept(first_kept, second_kept), first)
    assert errors[0].address == "up2.2.conv1"
    assert squared_error(twice, original) < cut


def test_images_leave_temporal_upsamplers_as_they_are() -> None:
    reference = toy_decoder()
    student = transfer_weights(reference, reference.spec, {})
    before = student.get_parameter("stages.up1.3.temporal.weight").clone()
    clips = [toy_latents(1, 8, 8, seed=seed) for seed in range(4)]
    errors = reconstruct(reference, student, {}, "up1.3", clips=clips, settings=FitSettings())
    assert "up1.3.temporal" not in [error.address for error in errors]
    assert torch.equal(student.get_parameter("stages.up1.3.temporal.weight"), before)


def test_clips_may_differ_in_size() -> None:
    reference = toy_decoder()
    student = transfer_weights(reference, reference.spec, {})
    clips = [toy_latents(3, 2, 4, seed=1), toy_latents(1, 3, 3, seed=2), toy_latents(2, 4, 2, seed=3)]
    errors = reconstruct(reference, student, {}, "up3.0", clips=clips)
    assert all(error.after < 1e-5 for error in errors)


def test_the_same_seed_gives_the_same_weights() -> None:
    reference = toy_decoder()
    weights = []
    for _ in range(2):
        student = transfer_weights(reference, reference.spec, {})
        reconstruct(reference, student, {}, "head.0")
        weights.append(student.get_parameter("stages.head.0.conv.weight"))
    assert torch.equal(*weights)


def test_no_clip_is_an_error() -> None:
    reference = toy_decoder()
    with pytest.raises(CalibrationError, match="no calibration clip"):
        reconstruct(reference, transfer_weights(reference, reference.spec, {}), {}, "up3.0", clips=[])


def test_too_few_positions_are_an_error() -> None:
    reference = toy_decoder()
    student = transfer_weights(reference, reference.spec, {})
    with pytest.raises(CalibrationError, match=r"mid\.0\.conv1: .* no unique solution: 72 positions"):
        reconstruct(reference, student, {}, "mid.0", settings=FitSettings(dampening_frac=0.0))


@pytest.mark.parametrize("clip", [0, 2])
def test_nan_clips_are_an_error(clip: int) -> None:
    clips = [latents.clone() for latents in CLIPS]
    clips[clip][0, 0, 1] = float("nan")
    reference = toy_decoder()
    with pytest.raises(CalibrationError, match=r"up3\.0\.conv1 \(inputs\): NaN or infinite"):
        reconstruct(reference, transfer_weights(reference, reference.spec, {}), {}, "up3.0", clips=clips)


def test_an_unreadable_clip_leaves_no_folder(temporary_folder: Path) -> None:
    def clips() -> Iterator[Tensor]:
        yield CLIPS[0]
        assert [path.name[:10] for path in temporary_folder.iterdir()] == ["flashvaed-"]
        raise OSError("broken file")

    reference = toy_decoder()
    with pytest.raises(OSError, match="broken file"):
        reconstruct_coder(
            reference,
            transfer_weights(reference, reference.spec, {}),
            {},
            clips(),
            first_block="up3.0",
            settings=FitSettings(),
            progress=SilentProgress(),
        )


@pytest.mark.parametrize(("name", "first"), [("original", None), ("converted", "mid.0"), ("pruned", "up1.3")])
def test_first_changed_block(name: str, first: str | None) -> None:
    assert first_changed_block(Decoder(original_spec()), Decoder(DECODER_SPECS[name])) == first


CHANNEL = FitSettings(mode="channel", dampening_frac=1e-9)


def test_channel_mode_keeps_an_unchanged_decoder() -> None:
    reference = toy_decoder()
    student = transfer_weights(reference, reference.spec, {})
    errors = reconstruct(reference, student, {}, "up1.3", settings=CHANNEL)
    assert all(error.after < 1e-5 for error in errors)
    assert squared_error(student, reference) < 1e-6


def test_channel_mode_makes_up_for_copies_exactly() -> None:
    """What is cut is a linear map of what is left, at every layer's input: the kernels absorb it."""
    reference = toy_decoder()
    duplicate_channels_(reference, "up2", "up1.3")
    kept = greedily_kept(reference, {"up2": 0.5})
    student = transfer_weights(reference, narrowed_spec(reference.spec, kept), kept)
    cut = squared_error(student, reference)
    # Copies of a kept channel have no variance of their own: the ridge has to tell them apart.
    errors = reconstruct(reference, student, kept, "up1.3", settings=FitSettings(mode="channel", dampening_frac=1e-7))
    assert "up2.0.shortcut" in [error.address for error in errors]
    assert cut > 0.1
    assert squared_error(student, reference) < 1e-5


@pytest.mark.parametrize("operator", ["frame2d", "dwsep3d"])
def test_channel_mode_beats_the_cut_with_few_positions(operator: str) -> None:
    """Two frames' worth of data: too little for whole kernels, enough for the maps."""
    reference = toy_decoder()
    kept = greedily_kept(reference, {"up2": 0.5, "up3": 0.75})
    spec = converted_spec(narrowed_spec(reference.spec, kept), {"up2": operator})  # type: ignore[dict-item]
    student = transfer_weights(reference, spec, kept)
    cut = squared_error(student, reference)
    few = [toy_latents(2, 2, 2, seed=7)]
    errors = reconstruct(
        reference, student, kept, "up1.3", clips=few, settings=FitSettings(mode="channel", dampening_frac=1e-4)
    )
    assert all(error.num_unknowns <= 17 for error in errors)
    assert squared_error(student, reference) < cut


def test_unchanged_layers_that_are_too_large_keep_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_fit, "MAX_UNCHANGED_FEATURES", 150)
    reference = toy_decoder()
    student = transfer_weights(reference, converted_spec(reference.spec, {"up2": "frame2d"}), {})
    before = student.get_parameter("stages.up3.0.conv1.weight").clone()  # 4 * 27 = 108 inputs: solved
    kept_before = student.get_parameter("stages.up2.3.spatial.weight").clone()  # 8 * 9 = 72 inputs: solved
    errors = {error.address: error for error in reconstruct(reference, student, {}, "up2.0")}
    assert all(error.num_unknowns > 0 for error in errors.values())
    assert not torch.equal(student.get_parameter("stages.up3.0.conv1.weight"), before)
    assert not torch.equal(student.get_parameter("stages.up2.3.spatial.weight"), kept_before)
    monkeypatch.setattr(layer_fit, "MAX_UNCHANGED_FEATURES", 100)
    student = transfer_weights(reference, converted_spec(reference.spec, {"up2": "frame2d"}), {})
    errors = {error.address: error for error in reconstruct(reference, student, {}, "up2.0")}
    assert torch.equal(student.get_parameter("stages.up3.0.conv1.weight"), before)
    left = errors["up3.0.conv1"]
    assert left.num_unknowns == 0 and left.before == left.after and 0.0 < left.after < 1.0
    assert errors["up2.0.conv1"].num_unknowns > 0  # changed: solved, however large


def test_a_large_spatial_layer_of_an_upsampler_is_measured_as_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact twin there enlarges the frames itself, which the fit has done already."""
    monkeypatch.setattr(layer_fit, "MAX_UNCHANGED_FEATURES", 70)
    reference = toy_decoder()
    student = transfer_weights(reference, converted_spec(reference.spec, {"up2": "frame2d"}), {})
    before = student.get_parameter("stages.up2.3.spatial.weight").clone()
    errors = {error.address: error for error in reconstruct(reference, student, {}, "up2.0")}
    assert torch.equal(student.get_parameter("stages.up2.3.spatial.weight"), before)
    assert errors["up2.3.spatial"].num_unknowns == 0 and 0.0 < errors["up2.3.spatial"].after < 1.0


@pytest.mark.parametrize("mode", ["full", "channel"])
def test_a_low_rank_time_conv_is_fitted_at_its_rank(mode: str) -> None:
    """Least squares of that rank beat the nearest kernel of that rank; a kernel that has it comes back whole."""
    reference = toy_decoder()
    student = transfer_weights(reference, with_time_rank(reference.spec, 0.25), {})
    errors = {e.address: e for e in reconstruct(reference, student, {}, "up0.3", settings=FitSettings(mode=mode))}  # type: ignore[arg-type]
    assert student.get_parameter("stages.up0.3.temporal.weight").shape == (32, 8)
    if mode == "full":
        assert errors["up0.3.temporal"].after < errors["up0.3.temporal"].before
    low = transfer_weights(student, student.spec, {})
    torch.testing.assert_close(low(HELD_OUT), student(HELD_OUT), rtol=0, atol=1e-5)
    torch.testing.assert_close(expanded_decoder(student)(HELD_OUT), student(HELD_OUT), rtol=0, atol=1e-5)
