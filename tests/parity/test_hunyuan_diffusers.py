"""Our HunyuanVideo against diffusers' `AutoencoderKLHunyuanVideo`: same random weights, same numbers.

In float64 the functions are the same (1e-14 of the range is measured); in float32 sums in another order leave 1e-5.
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
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.hunyuanvideo.spec import hunyuan_decoder_spec, hunyuan_encoder_spec
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.commands import invoke, succeed
from tests.hunyuan_toy import hunyuan_config, random_hunyuan
from tests.parity.oracles import share_of_range
from tests.toy import kept_of, toy_decoder

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

RANGE_BOUND = 1e-4
DOUBLE_BOUND = 1e-11


def saved(oracle: nn.Module, folder: Path) -> Checkpoint:
    oracle.save_pretrained(folder)  # type: ignore[operator]
    return load_checkpoint(folder, builtins={})


def take_whole_clips(found: Checkpoint) -> None:
    """Both coders without tiles in time."""
    coders: list[Any] = [found.require_encoder(), found.require_decoder()]
    for coder in coders:
        coder.spec = coder.spec.model_copy(update={"temporal_tiles": None})


@torch.no_grad()
def differences(oracle: Any, found: Checkpoint, *, num_frames: int, height: int, width: int) -> tuple[float, float]:
    """Of the latents and, from the oracle's latents of fresh noise, of the frames, as shares of their ranges."""
    dtype = next(oracle.parameters()).dtype
    pixels = torch.rand(1, 3, num_frames, height, width, dtype=dtype) * 2 - 1
    encoded = oracle.encode(pixels).latent_dist.mode()
    latents = torch.randn(encoded.shape, dtype=dtype)
    expected = oracle.decode(latents).sample.clamp(-1, 1)
    errors = (
        share_of_range(encode(found.require_encoder().to(dtype), pixels), encoded),
        share_of_range(decode(found.require_decoder().to(dtype), latents), expected),
    )
    print(f"{num_frames} frames of {height} x {width}: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    return errors


LENGTHS = (1, 13, 17, 21, 41)
"""Frames: clips of one tile, and of two to four whose last has 2, 3 or 5 latents."""


@pytest.mark.parametrize("mode", ["tiles", "whole clip"])
def test_the_same_function(mode: str, tmp_path: Path) -> None:
    oracle: Any = random_hunyuan(hunyuan_config())
    found = saved(oracle, tmp_path)
    assert (found.family, found.notes) == ("hunyuanvideo", ())
    assert found.latent_mean == (0.0,) * 16
    assert found.latent_std == pytest.approx((1 / 0.476986,) * 16)
    oracle.use_framewise_encoding = oracle.use_framewise_decoding = mode == "tiles"
    if mode == "whole clip":
        take_whole_clips(found)
    assert max(differences(oracle, found, num_frames=9, height=32, width=48)) <= RANGE_BOUND
    oracle.double()
    for num_frames in LENGTHS:
        assert max(differences(oracle, found, num_frames=num_frames, height=16, width=24)) <= DOUBLE_BOUND


@pytest.mark.bench
@pytest.mark.parametrize("mode", ["tiles", "whole clip"])
def test_full_size(mode: str, tmp_path: Path) -> None:
    oracle: Any = random_hunyuan(hunyuan_config(128, 32))
    found = saved(oracle, tmp_path)
    assert found.require_decoder().spec == hunyuan_decoder_spec(128)
    assert found.require_encoder().spec == hunyuan_encoder_spec(128)
    oracle.use_framewise_encoding = oracle.use_framewise_decoding = mode == "tiles"
    if mode == "whole clip":
        take_whole_clips(found)
    assert max(differences(oracle, found, num_frames=21, height=32, width=48)) <= RANGE_BOUND


# --- however the clip comes in -----------------------------------------------------------------


def at_once(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    return runtime.decode(latents)


def in_parts(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    parts = list(runtime.iter_parts(latents.split([2, 1, 3, latents.shape[2] - 6], dim=2)))
    assert [part.shape[2] for part in parts] == [5, 4, 12, 4 * (latents.shape[2] - 6)]
    return torch.cat(parts, dim=2)


def streamed(runtime: DecodeRuntime, latents: Tensor) -> Tensor:
    stream = runtime.open(latents.shape[3], latents.shape[4])
    frames = [stream.step(part) for part in latents.split(1, dim=2)]
    return torch.cat([*frames, stream.flush()], dim=2)


@pytest.mark.parametrize("way", [at_once, in_parts, streamed])
@pytest.mark.parametrize("settings", [DecodeSettings(), DecodeSettings(chunk=2), DecodeSettings(whole_clip=True)])
@pytest.mark.parametrize("num_latents", [7, 8, 11])
@torch.no_grad()
def test_however_a_clip_comes_in(
    num_latents: int, settings: DecodeSettings, way: Callable[[DecodeRuntime, Tensor], Tensor], tmp_path: Path
) -> None:
    oracle: Any = random_hunyuan(hunyuan_config(4, 2))
    decoder = saved(oracle, tmp_path).require_decoder()
    oracle.use_framewise_decoding = not settings.whole_clip
    latents = torch.randn(1, 16, num_latents, 2, 3)
    expected = oracle.decode(latents).sample.clamp(-1, 1)
    assert share_of_range(way(DecodeRuntime(decoder, settings), latents), expected) <= RANGE_BOUND


# --- files -------------------------------------------------------------------------------------


@torch.no_grad()
def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    assert first.family == second.family == "hunyuanvideo"
    for one, other in ((first.decoder, second.decoder), (first.encoder, second.encoder)):
        assert one is not None and other is not None and one.spec == other.spec
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("wrapper", ["", "vae."])
def test_tencents_file_has_the_names_of_the_class(wrapper: str, tmp_path: Path) -> None:
    """A pickle with `state_dict`, in some files with `vae.` before every name; diffusers renames nothing."""
    found = saved(random_hunyuan(hunyuan_config(32, 32)), tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save({"state_dict": {f"{wrapper}{name}": one for name, one in tensors.items()}}, tmp_path / "model.pt")
    assert_same(load_checkpoint(tmp_path / "model.pt", builtins={}), found)
    save_file(tensors, tmp_path / "single.safetensors")
    assert_same(load_checkpoint(tmp_path / "single.safetensors", builtins={}), found)


def test_tencents_configuration_is_understood(tmp_path: Path) -> None:
    found = saved(random_hunyuan(hunyuan_config()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["spatial_compression_ratio"], config["temporal_compression_ratio"], config["_class_name"]
    blocks = {"down_block_types": ["DownEncoderBlockCausal3D"] * 4, "up_block_types": ["UpDecoderBlockCausal3D"] * 4}
    config |= {"sample_size": 256, "sample_tsize": 64, "time_compression_ratio": 4, **blocks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_checkpoint(tmp_path, builtins={})
    assert again.notes == ()
    assert_same(again, found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8; supported for hunyuanvideo: 4"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is false; supported for hunyuanvideo: true"),
        ({"norm_num_groups": 3}, "cannot part 32 channels into 3 equal groups"),
        ({"block_out_channels": [8, 16, 32, 64]}, "supported for hunyuanvideo: widths as 1 : 2 : 4 : 4"),
    ],
)
def test_configurations_of_other_networks_are_refused(changed: dict, message: str, tmp_path: Path) -> None:
    saved(random_hunyuan(hunyuan_config()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(tmp_path, builtins={})


@torch.no_grad()
def test_exports_load_in_diffusers(tmp_path: Path) -> None:
    """The original as diffusers' class, and a pruned one as `AutoencoderFlash`, which decodes in the same tiles."""
    oracle: Any = random_hunyuan(hunyuan_config())
    found = saved(oracle, tmp_path / "vae")
    spec = found.require_decoder().spec
    narrow = toy_decoder(narrowed_spec(spec, kept_of(spec, ("mid", "up0", "up1", "up2", "up3"))))
    save_checkpoint(tmp_path / "narrow.safetensors", derived_header(found), decoder=narrow)
    for name in ("vae", "narrow.safetensors"):
        succeed(f"export {name} -t diffusers -t safetensors --output out-{name}", cwd=tmp_path)
    latents, pixels = torch.randn(1, 16, 7, 2, 3), torch.rand(1, 3, 21, 16, 24)
    model: Any = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "out-vae" / "diffusers")
    assert model.config.scaling_factor == 0.476986
    assert torch.equal(model.decode(latents).sample, oracle.decode(latents).sample)
    assert torch.equal(model.encode(pixels).latent_dist.mode(), oracle.encode(pixels).latent_dist.mode())
    folder = str(tmp_path / "out-narrow.safetensors" / "diffusers")
    flash: Any = diffusers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert share_of_range(flash.decode(latents).sample, decode(narrow, latents)) < RANGE_BOUND
    assert torch.equal(flash.encode(pixels).latent_dist.mode(), oracle.encode(pixels).latent_dist.mode())
    with pytest.warns(UserWarning, match="decodes whole frames"):
        flash.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    assert share_of_range(flash.decode(latents).sample, decode(narrow, latents)) < RANGE_BOUND
    again = load_checkpoint(tmp_path / "out-narrow.safetensors" / "narrow.safetensors", builtins={})
    assert again.require_decoder().spec == narrow.spec and again.family == "hunyuanvideo"


def test_what_makes_no_sense_says_why(tmp_path: Path) -> None:
    saved(random_hunyuan(hunyuan_config()), tmp_path / "vae")
    torch.save(torch.randn(1, 16, 2, 4, 4), tmp_path / "latents.pt")
    for words, why in (
        ("prune vae --layout native --ratio 0.5 --dry-run", "one block_out_channels and one norm_num_groups"),
        ("decode latents.pt -d vae -o video.mp4 --tile 2", "no tiles: head.0"),
    ):
        refused = invoke(words, cwd=tmp_path)
        assert refused.exit_code == 2 and why in " ".join(refused.stderr.split()), refused.stderr


@torch.no_grad()
def test_a_single_image_needs_no_time(tmp_path: Path) -> None:
    oracle: Any = random_hunyuan(hunyuan_config())
    saved(oracle, tmp_path / "vae")
    converted = succeed("convert-ops vae --profile image --output images.safetensors", cwd=tmp_path)
    assert converted["max_difference_of_range"] < 1e-5
    still = load_checkpoint(tmp_path / "images.safetensors", builtins={}).require_decoder()
    assert still.spec.still and still.spec.is_causal and still.spec.temporal_tiles is None
    latents = torch.randn(2, 16, 1, 3, 4)
    assert share_of_range(decode(still, latents), oracle.decode(latents).sample.clamp(-1, 1)) < RANGE_BOUND
    succeed("export images.safetensors -t safetensors --output out", cwd=tmp_path)
    assert load_checkpoint(tmp_path / "out" / "images.safetensors", builtins={}).require_decoder().spec == still.spec
