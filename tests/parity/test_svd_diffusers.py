"""Our Stable Video Diffusion VAE against diffusers' `AutoencoderKLTemporalDecoder`: same random weights, same numbers.

In float64 they differ by what rounds weights; in float32 sums in another order leave a few 1e-6 of the range.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.decoders.spec.coders import TemporalTiles
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.errors import ArtifactError, SpecError
from flashvaed_cli.families.stable_video_diffusion.spec import (
    CLIP_LENGTH,
    NAME,
    STABLE_VIDEO_DIFFUSION,
    svd_decoder_spec,
)
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.commands import invoke, succeed
from tests.parity.oracles import share_of_range
from tests.svd_toy import random_svd, svd_config
from tests.toy import kept_of, toy_decoder

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

RANGE_BOUND = 1e-4
FOLDED_BOUND = 1e-6
"""In float64: the share of each block is part of a weight, which was rounded to float32."""


def as_images(clip: Tensor) -> Tensor:
    """`[B, C, T, H, W]` to `[BT, C, H, W]`."""
    return clip.transpose(1, 2).flatten(0, 1)


@cache
def toy() -> Any:
    return random_svd(svd_config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """diffusers' folder of a pipeline: the VAE is in `vae`."""
    path = tmp_path_factory.mktemp("svd")
    toy().save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> Checkpoint:
    return load_checkpoint(folder / "vae", builtins={})


@torch.no_grad()
def of_class(oracle: Any, latents: Tensor, length: int = CLIP_LENGTH) -> Tensor:
    """Frames as the class gives them for `length` latents at a time, in [-1, 1]."""
    parts = []
    for part in latents.split(length, dim=2):
        frames = oracle.decode(as_images(part), num_frames=part.shape[2]).sample
        parts.append(frames.unflatten(0, (latents.shape[0], -1)).transpose(1, 2))
    return torch.cat(parts, dim=2).clamp(-1, 1)


@torch.no_grad()
def differences(oracle: Any, vae: Checkpoint, *, num_frames: int, height: int, width: int) -> tuple[float, float]:
    """Of the latents and, from the oracle's latents, of the frames, as shares of their ranges."""
    dtype = next(oracle.parameters()).dtype
    pixels = torch.rand(2, 3, num_frames, height, width, dtype=dtype) * 2 - 1
    encoded = oracle.encode(as_images(pixels)).latent_dist.mode()
    latents = encoded.unflatten(0, (2, num_frames)).transpose(1, 2)
    errors = (
        share_of_range(as_images(encode(vae.require_encoder().to(dtype), pixels)), encoded),
        share_of_range(decode(vae.require_decoder().to(dtype), latents), of_class(oracle, latents)),
    )
    print(f"{num_frames} frames of {height} x {width}: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    return errors


def test_the_same_function(tmp_path: Path) -> None:
    oracle = random_svd(svd_config(), seed=1)
    oracle.save_pretrained(tmp_path)  # type: ignore[operator]
    vae = load_checkpoint(tmp_path, builtins={})
    assert (vae.family, vae.notes) == (NAME, ())
    assert vae.latent_mean == (0.0,) * 4 and vae.latent_std == pytest.approx((1 / 0.18215,) * 4)
    assert vae.require_decoder().spec == svd_decoder_spec(32)
    assert max(differences(oracle, vae, num_frames=3, height=24, width=32)) <= RANGE_BOUND
    oracle.double()
    for num_frames in (1, 2, 5):
        assert max(differences(oracle, vae, num_frames=num_frames, height=16, width=24)) <= FOLDED_BOUND


@pytest.mark.bench
def test_full_size(tmp_path: Path) -> None:
    oracle = random_svd(svd_config(128))
    oracle.save_pretrained(tmp_path)  # type: ignore[operator]
    vae = load_checkpoint(tmp_path, builtins={})
    assert vae.require_decoder().spec == svd_decoder_spec(128)
    assert vae.require_encoder().spec == STABLE_VIDEO_DIFFUSION.encoder_spec(128, 4)
    assert max(differences(oracle, vae, num_frames=4, height=64, width=64)) <= RANGE_BOUND


@torch.no_grad()
def test_longer_clips_are_decoded_in_runs_as_decode_chunk_size_does(found: Checkpoint) -> None:
    decoder = found.require_decoder()
    assert decoder.spec.temporal_tiles == TemporalTiles(length=25, stride=25)
    latents = torch.randn(1, 4, 5, 2, 3)
    for length in (2, 5):
        runtime = DecodeRuntime(exact_decoder(decoder), DecodeSettings(clip_length=length))
        assert share_of_range(runtime.decode(latents), of_class(toy(), latents, length)) <= RANGE_BOUND
    assert share_of_range(of_class(toy(), latents, 2), of_class(toy(), latents)) > 0.05
    long = torch.randn(1, 4, 27, 1, 1)
    assert share_of_range(decode(decoder, long), of_class(toy(), long)) <= RANGE_BOUND


def test_the_command_takes_a_clip_length(folder: Path, tmp_path: Path) -> None:
    latents = torch.randn(1, 4, 5, 2, 3)
    torch.save(latents, tmp_path / "latents.pt")
    words = f"decode latents.pt -d '{folder / 'vae'}' --latent-scale raw --format pt"
    for length in (2, 5):
        succeed(f"{words} --clip-length {length} --output frames{length}.pt", cwd=tmp_path)
        frames = torch.load(tmp_path / f"frames{length}.pt", weights_only=True).reshape(1, 3, 5, 16, 24)
        assert share_of_range(frames, of_class(toy(), latents, length)) <= RANGE_BOUND
    told = invoke(f"{words} --chunk 2 --output chunk.pt", cwd=tmp_path)
    assert told.exit_code == 0 and "--chunk 2 is ignored" in " ".join((told.stdout + told.stderr).split())
    refused = invoke(f"{words} --tile 1 --output tile.pt", cwd=tmp_path)
    assert refused.exit_code == 2 and "no tiles: head.0" in refused.stderr
    other = invoke("decode latents.pt -d builtin:tiny-wan --clip-length 2 --output other.pt", cwd=tmp_path)
    assert other.exit_code == 2 and "no clip length" in other.stderr
    info = invoke(f"info '{folder / 'vae'}'", cwd=tmp_path)
    assert NAME in info.stdout and "sees whole clips: of 25 latents" in " ".join(info.stdout.split())


# --- files --------------------------------------------------------------------------------------


@torch.no_grad()
def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    assert first.family == second.family == NAME
    for one, other in ((first.decoder, second.decoder), (first.encoder, second.encoder)):
        assert one is not None and other is not None and one.spec == other.spec
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


ORIGINAL_NAMES = {
    "decoder.mid.block_1.mix_factor": "decoder.mid_block.resnets.0.time_mixer.mix_factor",
    "decoder.mid.block_2.norm1.weight": "decoder.mid_block.resnets.1.spatial_res_block.norm1.weight",
    "decoder.mid.attn_1.q.weight": "decoder.mid_block.attentions.0.to_q.weight",
    "decoder.up.3.block.1.time_stack.in_layers.0.bias": "decoder.up_blocks.0.resnets.1.temporal_res_block.norm1.bias",
    "decoder.up.3.block.1.time_stack.in_layers.2.bias": "decoder.up_blocks.0.resnets.1.temporal_res_block.conv1.bias",
    "decoder.up.0.block.2.time_stack.out_layers.0.weight": (
        "decoder.up_blocks.3.resnets.2.temporal_res_block.norm2.weight"
    ),
    "decoder.up.0.block.2.time_stack.out_layers.3.bias": "decoder.up_blocks.3.resnets.2.temporal_res_block.conv2.bias",
    "decoder.up.1.block.0.nin_shortcut.weight": (
        "decoder.up_blocks.2.resnets.0.spatial_res_block.conv_shortcut.weight"
    ),
    "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
    "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
    "decoder.conv_out.time_mix_conv.weight": "decoder.time_conv_out.weight",
    "encoder.down.1.block.0.conv1.weight": "encoder.down_blocks.1.resnets.0.conv1.weight",
}
"""Names of the original's file, with those of diffusers' for the same weights."""
HALVED = ("mix_factor", "out_layers.3.bias")  # written as a share of one half


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "whole model"])
def test_the_original_single_file(wrapped: bool, folder: Path, found: Checkpoint, tmp_path: Path) -> None:
    succeed(f"export '{folder / 'vae'}' -t safetensors --output out", cwd=tmp_path)
    tensors = load_file(tmp_path / "out" / "vae.safetensors")
    own = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert len(tensors) == len(own)
    for name, theirs in ORIGINAL_NAMES.items():
        assert tensors[name].numel() == own[theirs].numel(), name
        if not name.endswith(HALVED):
            assert torch.equal(tensors[name].flatten(), own[theirs].flatten()), name
    if wrapped:
        tensors = {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(4, 8, 3, 3)
        tensors["conditioner.embedders.3.encoder.quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
    save_file(tensors, tmp_path / "single.safetensors")
    assert_same(load_checkpoint(tmp_path / "single.safetensors", builtins={}), found)


def test_a_file_without_a_share_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    del tensors["decoder.up_blocks.1.resnets.2.time_mixer.mix_factor"]
    shutil.copytree(folder / "vae", tmp_path / "vae")
    save_file(tensors, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ArtifactError, match=r"up_blocks\.1\.resnets\.2\.time_mixer\.mix_factor is absent"):
        load_checkpoint(tmp_path / "vae", builtins={})


def test_a_layer_on_the_latents_of_the_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    tensors |= {"post_quant_conv.weight": torch.eye(4)[:, :, None, None], "post_quant_conv.bias": torch.zeros(4)}
    save_file(tensors, tmp_path / "svd.safetensors")
    with pytest.raises(ArtifactError, match=r"2 unexpected: post_quant_conv\.bias, post_quant_conv\.weight"):
        load_checkpoint(tmp_path / "svd.safetensors", builtins={})


@torch.no_grad()
def test_exports_load_in_diffusers(folder: Path, found: Checkpoint, tmp_path: Path) -> None:
    """The original as diffusers' class, a pruned one as `AutoencoderFlash`, which takes latents as that class does."""
    spec = found.require_decoder().spec
    narrow = toy_decoder(narrowed_spec(spec, kept_of(spec, ("mid", "up0", "up1", "up2", "up3"))))
    runs = {group.run for group in channel_groups(spec)}
    assert runs == {1, 2, 4}  # of 32, 64 and 128 channels in 32 groups
    in_time = narrow.spec.stage("up0").blocks[1]
    assert isinstance(in_time, ResBlockSpec) and in_time.norm.over == "clip"
    assert in_time.conv1.in_width == 96 and in_time.norm.groups == 24
    save_checkpoint(tmp_path / "narrow.safetensors", derived_header(found), decoder=narrow)
    succeed(f"export '{folder / 'vae'}' -t diffusers --output out-vae", cwd=tmp_path)
    succeed("export narrow.safetensors -t diffusers -t safetensors --output out", cwd=tmp_path)
    latents, pixels = torch.randn(1, 4, 5, 2, 3), torch.rand(1, 3, 16, 24)
    whole = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "out-vae" / "diffusers")
    assert whole.config.scaling_factor == 0.18215
    assert share_of_range(of_class(whole, latents), of_class(toy(), latents)) <= 1e-5
    assert torch.equal(whole.encode(pixels).latent_dist.mode(), toy().encode(pixels).latent_dist.mode())
    flash = diffusers.AutoModel.from_pretrained(str(tmp_path / "out" / "diffusers"), trust_remote_code=True)
    assert (flash.config.scaling_factor, flash.config.force_upcast) == (0.18215, True)
    assert share_of_range(of_class(flash, latents), decode(narrow, latents)) < 1e-5
    assert torch.equal(flash.encode(pixels).latent_dist.mode(), toy().encode(pixels).latent_dist.mode())
    with pytest.raises(SpecError, match="num_frames"):
        flash.decode(as_images(latents))
    again = load_checkpoint(tmp_path / "out" / "narrow.safetensors", builtins={})
    assert again.require_decoder().spec == narrow.spec
    assert share_of_range(decode(again.require_decoder(), latents), decode(narrow, latents)) < 1e-6


@torch.no_grad()
def test_an_encoder_without_its_1x1_layer_gets_one_that_changes_nothing(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("quant_conv.")}
    save_file(bare, tmp_path / "bare.safetensors")
    succeed("export bare.safetensors -t diffusers --output out", cwd=tmp_path)
    whole = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "out" / "diffusers")
    pixels = torch.rand(1, 3, 16, 24)
    assert torch.equal(whole.quant_conv(torch.ones(1, 8, 1, 1)), torch.ones(1, 8, 1, 1))
    torch.testing.assert_close(whole.encoder(pixels), toy().encoder(pixels))


@torch.no_grad()
def test_single_images(folder: Path, tmp_path: Path) -> None:
    succeed(f"convert-ops '{folder / 'vae'}' --profile image --output image.safetensors", cwd=tmp_path)
    succeed("export image.safetensors -t safetensors --output out", cwd=tmp_path)
    latents = torch.randn(1, 4, 1, 2, 3)
    for path in (tmp_path / "image.safetensors", tmp_path / "out" / "image.safetensors"):
        still = load_checkpoint(path, builtins={}).require_decoder()
        assert still.spec.still and not still.spec.sees_whole_clip
        assert share_of_range(decode(still, latents), of_class(toy(), latents)) <= RANGE_BOUND


def test_what_makes_no_sense_says_why(folder: Path, tmp_path: Path) -> None:
    for words, why in (
        (f"export '{folder / 'vae'}' -t comfyui", "no axis of time"),
        (f"prune '{folder / 'vae'}' --layout native --ratio 0.5 --dry-run", "32 groups in every norm"),
    ):
        refused = invoke(words, cwd=tmp_path)
        assert refused.exit_code == 2 and why in " ".join(refused.stderr.split()), refused.stderr
