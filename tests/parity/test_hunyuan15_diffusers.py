"""Our HunyuanVideo 1.5 against diffusers' `AutoencoderKLHunyuanVideo15`: same random weights, same numbers.

In float64 the functions are the same; in float32 sums in another order leave 1e-5 of the range.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.errors import ArtifactError, DecodeError
from flashvaed_cli.families.hunyuanvideo15.names import HUNYUAN_15_ORIGINAL
from flashvaed_cli.families.hunyuanvideo15.spec import hunyuan15_decoder_spec, hunyuan15_encoder_spec
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.commands import invoke, succeed
from tests.hunyuan15_toy import hunyuan15_config, hunyuan15_spec, random_hunyuan15
from tests.parity.oracles import share_of_range
from tests.toy import kept_of, toy_decoder

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

RANGE_BOUND = 1e-4
DOUBLE_BOUND = 1e-11


def saved(oracle: nn.Module, folder: Path) -> Checkpoint:
    oracle.save_pretrained(folder)  # type: ignore[operator]
    return load_checkpoint(folder, builtins={})


@torch.no_grad()
def differences(
    oracle: Any, found: Checkpoint, *, num_frames: int, height: int, width: int, chunk: int | None = None
) -> tuple[float, float]:
    """Of the latents and, from fresh noise as latents, of the frames, as shares of their ranges."""
    dtype = next(oracle.parameters()).dtype
    pixels = torch.rand(1, 3, num_frames, height, width, dtype=dtype) * 2 - 1
    encoded = oracle.encode(pixels).latent_dist.mode()
    latents = torch.randn(encoded.shape, dtype=dtype)
    expected = oracle.decode(latents).sample.clamp(-1, 1)
    errors = (
        share_of_range(encode(found.require_encoder().to(dtype), pixels, chunk=chunk), encoded),
        share_of_range(decode(found.require_decoder().to(dtype), latents, chunk=chunk), expected),
    )
    print(f"{num_frames} frames of {height} x {width}: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    return errors


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_the_same_function(chunk: int | None, tmp_path: Path) -> None:
    """The class takes every clip at once; a state with all earlier keys and values gives the same chunk by chunk."""
    oracle: Any = random_hunyuan15(hunyuan15_config())
    found = saved(oracle, tmp_path)
    assert (found.family, found.notes) == ("hunyuanvideo-1.5", ())
    assert found.latent_mean == (0.0,) * 32
    assert found.latent_std == pytest.approx((1 / 1.03682,) * 32)
    assert found.require_decoder().spec.is_causal and found.require_encoder().spec.is_causal
    assert max(differences(oracle, found, num_frames=9, height=32, width=48, chunk=chunk)) <= RANGE_BOUND
    oracle.double()
    for num_frames in (1, 5, 17):
        found_errors = differences(oracle, found, num_frames=num_frames, height=32, width=32, chunk=chunk)
        assert max(found_errors) <= DOUBLE_BOUND


@pytest.mark.bench
def test_full_size(tmp_path: Path) -> None:
    oracle: Any = random_hunyuan15(hunyuan15_config(128))
    found = saved(oracle, tmp_path)
    assert found.require_decoder().spec == hunyuan15_decoder_spec(128)
    assert found.require_encoder().spec == hunyuan15_encoder_spec(128)
    assert max(differences(oracle, found, num_frames=9, height=32, width=48)) <= RANGE_BOUND


# --- however the clip comes in -----------------------------------------------------------------


def at_once(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    return runtime.decode(latents)


def in_parts(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    parts = list(runtime.iter_parts(latents.split([2, 1, 2], dim=2)))
    assert [part.shape[2] for part in parts] == [5, 4, 8]
    return torch.cat(parts, dim=2)


def streamed(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    stream = runtime.open(latents.shape[3], latents.shape[4])
    frames = [stream.step(part) for part in latents.split(1, dim=2)]
    return torch.cat([*frames, stream.flush()], dim=2)


SETTINGS = (DecodeSettings(), DecodeSettings(chunk=2), DecodeSettings(tile=3), DecodeSettings(chunk=1, tile=2))


@pytest.fixture(scope="module")
def whole_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Tensor, Tensor]:
    """A decoder, latents, and the frames that the class makes of them."""
    torch.manual_seed(0)
    oracle: Any = random_hunyuan15(hunyuan15_config())
    decoder = saved(oracle, tmp_path_factory.mktemp("whole")).require_decoder()
    latents = torch.randn(1, 32, 5, 4, 5)
    with torch.no_grad():
        return decoder, latents, oracle.decode(latents).sample.clamp(-1, 1)


@pytest.mark.parametrize("way", [at_once, in_parts, streamed])
@pytest.mark.parametrize("settings", SETTINGS, ids=["whole", "chunks", "tiles", "both"])
@torch.no_grad()
def test_however_a_clip_comes_in(
    settings: DecodeSettings,
    way: Callable[[DecodeRuntime, Tensor], Tensor],
    whole_clip: tuple[Decoder, Tensor, Tensor],
) -> None:
    """Tiles give the frames of a whole picture; those of the class, where they are on, are pictures of their own."""
    decoder, latents, expected = whole_clip
    assert share_of_range(way(DecodeRuntime(decoder, settings), latents), expected) <= RANGE_BOUND


@torch.no_grad()
def test_a_compiled_step_cannot_grow(tmp_path: Path) -> None:
    decoder = saved(random_hunyuan15(hunyuan15_config()), tmp_path).require_decoder()
    runtime = DecodeRuntime(decoder, DecodeSettings(chunk=1, compile=True, compile_backend="eager"))
    with pytest.raises(DecodeError, match="state of this decoder grows"):
        runtime.decode(torch.randn(1, 32, 2, 1, 2))


# --- files -------------------------------------------------------------------------------------


@torch.no_grad()
def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    assert first.family == second.family == "hunyuanvideo-1.5"
    for one, other in ((first.decoder, second.decoder), (first.encoder, second.encoder)):
        assert one is not None and other is not None and one.spec == other.spec
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


RENAMED = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "up_blocks.": "up.",
    "down_blocks.": "down.",
    ".resnets.": ".block.",
    "upsamplers.0.": "upsample.",
    "downsamplers.0.": "downsample.",
}
"""diffusers' names to Tencent's, as its conversion has them."""


def as_tencents(name: str) -> str:
    for theirs, own in RENAMED.items():
        name = name.replace(theirs, own)
    return name


@pytest.mark.parametrize("wrapper", ["", "vae."])
def test_tencents_file_is_read(wrapper: str, tmp_path: Path) -> None:
    found = saved(random_hunyuan15(hunyuan15_config()), tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    own = {as_tencents(name): one for name, one in tensors.items()}
    save_file({f"{wrapper}{name}": one for name, one in own.items()}, tmp_path / "single.safetensors")
    assert_same(load_checkpoint(tmp_path / "single.safetensors", builtins={}), found)
    coders = [(one.state_dict(), one.spec) for one in (found.require_decoder(), found.require_encoder())]
    written = to_program(coders, HUNYUAN_15_ORIGINAL, ((), ()))
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], own[name]) and written[name].shape == own[name].shape for name in own)
    save_file(
        {name: one for name, one in tensors.items() if name.startswith("decoder.")}, tmp_path / "half.safetensors"
    )
    half = load_checkpoint(tmp_path / "half.safetensors", builtins={})
    assert half.encoder is None and half.require_decoder().spec == found.require_decoder().spec


def test_tencents_configuration_is_understood(tmp_path: Path) -> None:
    found = saved(random_hunyuan15(hunyuan15_config()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["spatial_compression_ratio"], config["temporal_compression_ratio"], config["_class_name"]
    config |= {"sample_size": 256, "sample_tsize": 64, "ffactor_spatial": 16, "ffactor_temporal": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "shift_factor": None}))
    again = load_checkpoint(tmp_path, builtins={})
    assert again.notes == ()
    assert_same(again, found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temporal_compression_ratio": 8}, r"temporal_compression_ratio is 8; supported for hunyuanvideo-1\.5: 4"),
        ({"upsample_match_channel": False}, r"upsample_match_channel is false; supported for hunyuanvideo-1\.5: true"),
        ({"block_out_channels": [8, 16, 32, 32, 32]}, "widths as 1 : 2 : 4 : 8 : 8"),
        (
            {"decoder_upsample_residual": [True]},
            r"decoder_upsample_residual is \[True\]; supported: 4 of true or false",
        ),
        ({"_class_name": "AutoencoderKLHunyuanImageRefiner"}, "is of AutoencoderKLHunyuanImageRefiner"),
        ({"_class_name": "AutoencoderKLHunyuanVideo"}, "--family hunyuanvideo-1.5 reads it so"),
    ],
)
def test_configurations_of_other_networks_are_refused(changed: dict, message: str, tmp_path: Path) -> None:
    saved(random_hunyuan15(hunyuan15_config()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(tmp_path, builtins={})


@torch.no_grad()
def test_exports_load_in_diffusers(tmp_path: Path) -> None:
    """The original as diffusers' class, and a pruned one as `AutoencoderFlash`."""
    oracle: Any = random_hunyuan15(hunyuan15_config())
    found = saved(oracle, tmp_path / "vae")
    spec = found.require_decoder().spec
    narrow = toy_decoder(narrowed_spec(spec, kept_of(spec, ("mid", "up0", "up1", "up2", "up3", "up4"))))
    save_checkpoint(tmp_path / "narrow.safetensors", derived_header(found), decoder=narrow)
    for name in ("vae", "narrow.safetensors"):
        succeed(f"export {name} -t diffusers -t safetensors --output out-{name}", cwd=tmp_path)
    latents, pixels = torch.randn(1, 32, 3, 2, 3), torch.rand(1, 3, 9, 32, 48)
    model: Any = diffusers.AutoencoderKLHunyuanVideo15.from_pretrained(tmp_path / "out-vae" / "diffusers")
    assert model.config.scaling_factor == 1.03682
    assert torch.equal(model.decode(latents).sample, oracle.decode(latents).sample)
    assert torch.equal(model.encode(pixels).latent_dist.mode(), oracle.encode(pixels).latent_dist.mode())
    folder = str(tmp_path / "out-narrow.safetensors" / "diffusers")
    flash: Any = diffusers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    expected = decode(narrow, latents)
    assert share_of_range(flash.decode(latents).sample, expected) < RANGE_BOUND
    assert torch.equal(flash.encode(pixels).latent_dist.mode(), oracle.encode(pixels).latent_dist.mode())
    flash.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    assert share_of_range(flash.decode(latents).sample, expected) < RANGE_BOUND
    again = load_checkpoint(tmp_path / "out-narrow.safetensors" / "narrow.safetensors", builtins={})
    assert again.require_decoder().spec == narrow.spec and again.family == "hunyuanvideo-1.5"


def test_what_makes_no_sense_says_why(tmp_path: Path) -> None:
    saved(random_hunyuan15(hunyuan15_config()), tmp_path / "vae")
    torch.save(torch.randn(1, 32, 2, 4, 4), tmp_path / "latents.pt")
    for words, why in (
        ("prune vae --layout native --ratio 0.5 --dry-run", "one block_out_channels for encoder and decoder"),
        ("decode latents.pt -d vae -o video.mp4 --clip-length 2", "no clip length"),
        ("convert-ops vae --time-rank 0.5 --dry-run", "shuffling channels of up0.3, up1.3"),
    ):
        refused = invoke(words, cwd=tmp_path)
        assert refused.exit_code == 2 and why in " ".join(refused.stderr.split()), refused.stderr


@torch.no_grad()
def test_graphs_take_clips(tmp_path: Path) -> None:
    """Each export is compared with the decoder before it is written; a graph for steps would have to grow."""
    decoder = toy_decoder(hunyuan15_spec())  # narrower than the class allows: tracing takes long enough
    statistics = (0.0,) * decoder.spec.latent_width, (1.0,) * decoder.spec.latent_width
    header = ArtifactHeader(kind="vae", family="hunyuanvideo-1.5", latent_mean=statistics[0], latent_std=statistics[1])
    save_checkpoint(tmp_path / "vae.safetensors", header, decoder=decoder)
    exported = succeed("export vae.safetensors -t onnx -t pt2 --output out", cwd=tmp_path)
    assert "state grows from step to step" in str(exported)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "step" in path.name) == []
    assert {path.suffix for path in (tmp_path / "out").iterdir()} >= {".onnx", ".pt2"}


@torch.no_grad()
def test_a_single_image_needs_no_time(tmp_path: Path) -> None:
    oracle: Any = random_hunyuan15(hunyuan15_config())
    saved(oracle, tmp_path / "vae")
    converted = succeed("convert-ops vae --profile image --output images.safetensors", cwd=tmp_path)
    assert converted["max_difference_of_range"] < 1e-5
    still = load_checkpoint(tmp_path / "images.safetensors", builtins={}).require_decoder()
    assert still.spec.still and still.spec.is_causal
    latents = torch.randn(2, 32, 1, 3, 4)
    expected = torch.cat([oracle.decode(one).sample for one in latents.split(1)])  # the class takes no batches
    assert share_of_range(decode(still, latents), expected.clamp(-1, 1)) < RANGE_BOUND
    succeed("export images.safetensors -t safetensors --output out", cwd=tmp_path)
    assert load_checkpoint(tmp_path / "out" / "images.safetensors", builtins={}).require_decoder().spec == still.spec
