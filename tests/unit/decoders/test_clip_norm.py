"""GroupNorm over clips, and the runs of latents that such a decoder takes at a time, each as a clip of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.memory_format import channels_last
from flashvaed_cli.decoders.modules.norms import FrameGroupNorm
from flashvaed_cli.decoders.predict.memory import predict_peak_bytes
from flashvaed_cli.decoders.predict.planning import choose_plan
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, decode_step
from flashvaed_cli.decoders.spec.blocks import BlockSpec, ConvBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec, TemporalTiles
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec
from flashvaed_cli.errors import DecodeError, SpecError
from flashvaed_cli.export.onnx_graph import export_onnx
from flashvaed_cli.export.pt2 import export_pt2
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.media.cuts import LatentGrid
from tests.toy import toy_decoder

BOUND = 1e-5
LENGTH = 3


def over_clips(spec: DecoderSpec, length: int | None = None) -> DecoderSpec:
    """The spec with every GroupNorm over clips; longer ones in runs of `length` latents."""
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        norms = {
            name: norm.model_copy(update={"over": "clip"})
            for name in type(block).model_fields
            if isinstance(norm := getattr(block, name), NormSpec)
        }
        changed[address] = block.model_copy(update=norms)
    tiles = None if length is None else TemporalTiles(length=length, stride=length)
    return DecoderSpec(**{**dict(spec.with_blocks(changed)), "temporal_tiles": tiles})


FRAMES = get_family("sdxl").decoder_spec(8, 4)
CLIPS, RUNS = over_clips(FRAMES), over_clips(FRAMES, LENGTH)


def clip_of(num_latents: int) -> Tensor:
    """Latents whose frames differ in contrast, so that statistics over other runs show."""
    torch.manual_seed(0)
    return torch.randn(1, 4, num_latents, 3, 2) * torch.linspace(0.2, 3, num_latents).view(-1, 1, 1)


@pytest.mark.parametrize("is_channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_all_frames(dtype: torch.dtype, is_channels_last: bool) -> None:
    norm = FrameGroupNorm(6, NormSpec(eps=1e-5, shift=True, groups=3, over="clip")).requires_grad_(False)
    assert norm.gamma is not None and norm.beta is not None
    torch.manual_seed(0)
    norm.gamma.uniform_(0.5, 1.5)
    norm.beta.normal_()
    x = (torch.randn(2, 6, 4, 3, 5) * torch.arange(1, 5).view(-1, 1, 1)).to(dtype)
    unit = x.double().unflatten(1, (3, 2))
    mean, variance = unit.mean((2, 3, 4, 5), keepdim=True), unit.var((2, 3, 4, 5), unbiased=False, keepdim=True)
    unit = ((unit - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    expected = unit * norm.gamma.double().view(-1, 1, 1, 1) + norm.beta.double().view(-1, 1, 1, 1)
    found = norm.to(dtype)(channels_last(x) if is_channels_last else x).double()
    bound = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_of_one_frame_both_norms_are_the_same() -> None:
    latents = clip_of(1)
    torch.testing.assert_close(decode(toy_decoder(CLIPS), latents), decode(toy_decoder(FRAMES), latents))


def test_headers_of_norms_over_frames_say_nothing_new() -> None:
    assert "over" not in str(FRAMES.model_dump()) and "temporal_tiles" not in str(FRAMES.model_dump())
    assert DecoderSpec.model_validate(RUNS.model_dump(mode="json")) == RUNS
    with pytest.raises(ValueError, match="only GroupNorm"):
        NormSpec(over="clip")


# --- runs ---------------------------------------------------------------------------------------


@torch.no_grad()
def each_run_alone(decoder: Decoder, latents: Tensor, length: int = LENGTH) -> Tensor:
    return torch.cat([decoder(part).clamp(-1, 1) for part in latents.split(length, dim=2)], dim=2)


def at_once(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    return runtime.decode(latents)


def in_parts(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    parts = list(runtime.iter_parts(latents.split(2, dim=2)))
    assert [part.shape[2] for part in parts] == [part.shape[2] for part in latents.split(2, dim=2)]
    return torch.cat(parts, dim=2)


def streamed(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    stream = runtime.open(latents.shape[3], latents.shape[4])
    frames = [stream.step(part) for part in latents.split(1, dim=2)]
    assert [given.shape[2] for given in frames][:LENGTH] == [0, 0, LENGTH]  # frames come with the end of their run
    return torch.cat([*frames, stream.flush()], dim=2)


@pytest.mark.parametrize("settings", [DecodeSettings(), DecodeSettings(chunk=2), DecodeSettings(chunk=5)])
@pytest.mark.parametrize("way", [at_once, in_parts, streamed])
@pytest.mark.parametrize("num_latents", [LENGTH, 7])
def test_runs_do_not_know_each_other_however_a_clip_comes_in(
    num_latents: int, way: Callable[[DecodeRuntime, Tensor], Tensor], settings: DecodeSettings
) -> None:
    decoder, latents = toy_decoder(RUNS), clip_of(num_latents)
    expected = each_run_alone(decoder, latents)
    torch.testing.assert_close(way(DecodeRuntime(decoder, settings), latents), expected, rtol=0, atol=BOUND)
    torch.testing.assert_close(decode(decoder, latents, chunk=2), expected, rtol=0, atol=BOUND)


def test_the_length_of_a_run_belongs_to_the_definition() -> None:
    latents = clip_of(6)
    whole, runs = decode(toy_decoder(CLIPS), latents), decode(toy_decoder(RUNS), latents)
    assert float((whole - runs).abs().max()) > 0.05


@pytest.mark.parametrize("length", [1, 2, 6, 100])
def test_another_length_when_asked_for(length: int) -> None:
    decoder, latents = toy_decoder(RUNS), clip_of(6)
    found = DecodeRuntime(decoder, DecodeSettings(clip_length=length)).decode(latents)
    torch.testing.assert_close(found, each_run_alone(decoder, latents, length), rtol=0, atol=BOUND)
    assert decoder.spec.temporal_tiles == TemporalTiles(length=LENGTH, stride=LENGTH)


def test_a_length_where_none_matters_is_refused() -> None:
    with pytest.raises(SpecError, match=r"no clip length: .* gives the same frames whatever it takes at a time"):
        DecodeRuntime(toy_decoder(FRAMES), DecodeSettings(clip_length=4))
    with pytest.raises(SpecError, match="at least 1 latent"):
        DecodeRuntime(toy_decoder(RUNS), DecodeSettings(clip_length=0))
    with pytest.raises(ValueError, match="only a coder that sees whole clips"):
        DecoderSpec(**{**dict(FRAMES), "temporal_tiles": TemporalTiles(length=2, stride=2)})


def test_an_overlap_is_kept_where_it_fits() -> None:
    tiles = TemporalTiles(length=5, stride=3)
    assert tiles.resized(9) == TemporalTiles(length=9, stride=7)
    with pytest.raises(
        SpecError, match="clips of 2 latents leave nothing beside the 2 that they share: give at least 3"
    ):
        tiles.resized(2)


# --- what follows -------------------------------------------------------------------------------


def test_no_steps_and_no_tiles_of_frames() -> None:
    decoder = toy_decoder(RUNS)
    assert not RUNS.is_causal and RUNS.sees_whole_clip and not FRAMES.sees_whole_clip
    with pytest.raises(SpecError, match="sees whole clips"):
        decode_step(decoder, clip_of(2), None)
    with pytest.raises(SpecError, match=r"no tiles: head.0 .* a shorter clip length takes less memory"):
        DecodeRuntime(decoder, DecodeSettings(tile=1)).decode(clip_of(2))


def test_memory_is_that_of_whole_runs() -> None:
    whole, run = (predict_peak_bytes(RUNS, (frames, 40, 40)) for frames in (30, LENGTH))
    assert predict_peak_bytes(RUNS, (30, 40, 40), chunk=1) == whole < 1.5 * run
    assert predict_peak_bytes(CLIPS, (30, 40, 40), chunk=1) > 5 * run
    assert choose_plan(RUNS, (30, 40, 40), chunk=1).chunk == LENGTH
    with pytest.raises(DecodeError, match=r"clips of 3 latents are decoded at once.* a shorter clip length"):
        choose_plan(RUNS, (30, 40, 40), max_memory_bytes=40 * 2**20)


def test_clips_to_calibrate_and_train_on_are_single_runs() -> None:
    grid = LatentGrid(temporal_factor=4, spatial_factor=8, clip_length=5)
    assert [grid.whole_frames(count) for count in (1, 16, 17, 18, 81)] == [1, 13, 17, 17, 17]
    assert LatentGrid(1, 8).whole_frames(81) == 81


@torch.no_grad()
def test_graphs_take_a_run_and_say_so(tmp_path: Path) -> None:
    """Exports are checked on up to four latents: with runs of three, only clips of a single run are compared."""
    ends = [stage for stage in FRAMES.stages if stage.name in ("conv_in", "head")]
    wide = ConvBlockSpec(conv=ConvSpec(operator="pointwise", in_width=32, out_width=8, kernel=(1, 1, 1)))
    stages = (StageSpec(name="conv_in", blocks=(ends[0].blocks[0], wide)), ends[1])
    spec = DecoderSpec(family="sdxl", stages=stages, temporal_factor=1, spatial_factor=1)
    decoder = toy_decoder(over_clips(spec, LENGTH))
    for result in (
        *export_onnx(decoder, tmp_path / "a.onnx", kinds=("clip",)),
        export_pt2(decoder, tmp_path / "a.pt2"),
    ):
        assert result.max_abs_difference < BOUND
        assert any(f"the decoder itself takes {LENGTH} at a time" in note for note in result.notes)
    program = torch.export.load(tmp_path / "a.pt2").module()
    latents = clip_of(LENGTH)
    torch.testing.assert_close(program(latents), decode(decoder, latents), rtol=0, atol=BOUND)
