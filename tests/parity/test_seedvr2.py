"""Our SeedVR2 against its arithmetic written out from facts (`tests/seedvr2_toy.py`): no package has its class."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.seedvr2.spec import seedvr2_decoder_spec, seedvr2_encoder_spec
from tests.commands import invoke, succeed
from tests.parity.oracles import share_of_range
from tests.seedvr2_toy import Reference, Tensors, seedvr2_tensors

RANGE_BOUND = 1e-4
DOUBLE_BOUND = 1e-11
BASE_WIDTH = 32  # with the release's 32 groups


def saved(tensors: Tensors, path: Path) -> Checkpoint:
    save_file(tensors, path)
    return load_checkpoint(path, builtins={})


@torch.no_grad()
def differences(tensors: Tensors, found: Checkpoint, frames: int, dtype: torch.dtype, chunk: int | None) -> float:
    """The larger of those of latents and of frames, as shares of their ranges."""
    reference = Reference({name: one.to(dtype) for name, one in tensors.items()}, 32)
    pixels = torch.rand(1, 3, frames, 16, 24, dtype=dtype) * 2 - 1
    encoded = reference.encode(pixels)
    latents = torch.randn(encoded.shape, dtype=dtype)
    expected = reference.decode(latents).clamp(-1, 1)
    errors = (
        share_of_range(encode(found.require_encoder().to(dtype), pixels, chunk=chunk), encoded),
        share_of_range(decode(found.require_decoder().to(dtype), latents, chunk=chunk), expected),
    )
    print(f"{frames} frames, {dtype}: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    return max(errors)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_the_same_function(chunk: int | None, tmp_path: Path) -> None:
    """Chunk by chunk too, as the original slices clips in time with a state."""
    tensors = seedvr2_tensors(BASE_WIDTH)
    found = saved(tensors, tmp_path / "ema_vae.safetensors")
    assert (found.family, found.notes) == ("seedvr2", ())
    assert found.latent_std == pytest.approx((1 / 0.9152,) * 16)
    assert found.require_decoder().spec == seedvr2_decoder_spec(BASE_WIDTH)
    assert found.require_encoder().spec == seedvr2_encoder_spec(BASE_WIDTH)
    assert found.require_decoder().spec.is_causal and not found.require_decoder().spec.grows_state
    assert differences(tensors, found, 9, torch.float32, chunk) <= RANGE_BOUND
    for frames in (1, 5, 13):
        assert differences(tensors, found, frames, torch.float64, chunk) <= DOUBLE_BOUND


@torch.no_grad()
def test_pickles_and_exports(tmp_path: Path) -> None:
    tensors = seedvr2_tensors(BASE_WIDTH)
    torch.save(tensors, tmp_path / "ema_vae.pth")
    found = load_checkpoint(tmp_path / "ema_vae.pth", builtins={})
    told = succeed("export ema_vae.pth -t safetensors --output out", cwd=tmp_path)
    assert "safetensors: diffusers has no class for seedvr2" in str(told) and "no original" not in str(told)
    written = load_file(tmp_path / "out" / "ema_vae.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], one) and written[name].shape == one.shape for name, one in tensors.items())
    latents = torch.randn(1, 16, 3, 2, 3)
    again = load_checkpoint(tmp_path / "out" / "ema_vae.safetensors", builtins={})
    assert torch.equal(decode(again.require_decoder(), latents), decode(found.require_decoder(), latents))
    runtime = DecodeRuntime(found.require_decoder(), DecodeSettings(dtype=torch.float64, chunk=1))
    assert share_of_range(runtime.decode(latents), Reference(tensors, 32).decode(latents).clamp(-1, 1)) < RANGE_BOUND
    folder = invoke("export ema_vae.pth --target diffusers --output folder", cwd=tmp_path)
    assert folder.exit_code == 2 and "diffusers: it has no class for seedvr2" in folder.stderr


def test_it_is_told_apart_from_images(tmp_path: Path) -> None:
    """It has all names of Stable Diffusion's VAE, with kernels in time."""
    tensors = seedvr2_tensors(BASE_WIDTH)
    for role in ("encoder", "decoder"):
        half = {name: one for name, one in tensors.items() if name.startswith(f"{role}.")}
        assert saved(half, tmp_path / f"{role}.safetensors").family == "seedvr2"


def test_no_profile_of_images_names_what_doubles_frames(tmp_path: Path) -> None:
    save_file(seedvr2_tensors(BASE_WIDTH), tmp_path / "vae.safetensors")
    refused = invoke("convert-ops vae.safetensors --profile image", cwd=tmp_path)
    said = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and "up0_grown.0 (shuffle_upsample) works in time too" in said


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_post_quant_conv": True}, "use_post_quant_conv is true; the weights have false"),
        ({"use_quant_conv": True}, "use_quant_conv is true; the weights have false"),
        ({"latent_channels": "16"}, "latent_channels is '16'; the weights have 16"),
    ],
)
def test_a_config_that_does_not_fit_is_named(config: dict, message: str, tmp_path: Path) -> None:
    save_file(seedvr2_tensors(BASE_WIDTH), tmp_path / "ema_vae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=re.escape(message)):
        load_checkpoint(tmp_path, builtins={})


def test_a_tensor_without_axes_is_named(tmp_path: Path) -> None:
    name = "decoder.up_blocks.0.upsamplers.0.upscale_conv.bias"
    tensors = {**seedvr2_tensors(BASE_WIDTH), name: torch.tensor(0.5)}
    with pytest.raises(ArtifactError, match=re.escape(f"{name} (expected [1024], found [])")):
        saved(tensors, tmp_path / "ema_vae.safetensors")


def test_an_image_vae_named_as_this_one_does_not_fit(tmp_path: Path) -> None:
    decoder = {name: one for name, one in seedvr2_tensors(BASE_WIDTH).items() if "upscale_conv" not in name}
    flat = {name: one[:, :, 0].contiguous() if one.ndim == 5 else one for name, one in decoder.items()}
    save_file(flat, tmp_path / "sd3.safetensors")
    said = invoke("info sd3.safetensors --family seedvr2", cwd=tmp_path).stderr
    assert (
        "its first layer has a kernel of 4 axes, not 5" in " ".join(said.split())
        and "seedvr2-original: fits" not in said
    )
