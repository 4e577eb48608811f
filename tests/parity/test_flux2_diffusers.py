"""Our FLUX.2 VAE against diffusers' `AutoencoderKLFlux2`: same random weights, float32, same numbers.

The bound of 1e-4 of the output's range leaves room for float32 sums in another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flashvaed_cli as flashvaed
from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.decoders.spec.latent_patches import per_channel
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.families.uniform_layout import encoder_base_width, fits_uniform_layout
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.commands import succeed
from tests.kl_toys import flux2_config, random_flux2
from tests.parity.oracles import share_of_range
from tests.toy import kept_of, toy_decoder

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

RANGE_BOUND = 1e-4


def saved(oracle: Any, folder: Path) -> Checkpoint:
    oracle.save_pretrained(folder)
    return load_checkpoint(folder, builtins={})


def packed(oracle: Any, latents: Tensor) -> Tensor:
    """What the transformer takes, by diffusers' own pipeline: `[B, C, H, W]` to normalized `[B, 4 C, H / 2, W / 2]`."""
    patches = diffusers.Flux2Pipeline._patchify_latents(latents)
    mean = oracle.bn.running_mean.view(1, -1, 1, 1)
    return (patches - mean) / (oracle.bn.running_var.view(1, -1, 1, 1) + oracle.config.batch_norm_eps).sqrt()


@torch.no_grad()
def assert_parity(oracle: Any, found: Checkpoint, height: int, width: int) -> None:
    pixels = torch.rand(2, 3, height, width) * 2 - 1
    expected_latents = oracle.encode(pixels).latent_dist.mode()
    expected = oracle.decode(expected_latents).sample
    latents = encode(found.require_encoder(), pixels.unsqueeze(2)).squeeze(2)
    frames = found.require_decoder()(expected_latents.unsqueeze(2)).squeeze(2)
    errors = share_of_range(latents, expected_latents), share_of_range(frames, expected)
    print(f"2 images of {height} x {width}: encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    assert max(errors) <= RANGE_BOUND


def test_small(tmp_path: Path) -> None:
    oracle = random_flux2(flux2_config())
    found = saved(oracle, tmp_path)
    assert (found.family, found.notes, found.latent_width) == ("flux.2", (), 32)
    assert_parity(oracle, found, 48, 32)
    assert_parity(oracle, found, 16, 40)


def test_a_decoder_of_its_own_width(tmp_path: Path) -> None:
    """As the official small decoder has: three quarters of the width."""
    oracle = random_flux2(flux2_config(16, decoder_block_out_channels=[12, 24, 48, 48]))
    found = saved(oracle, tmp_path)
    spec = found.require_decoder().spec
    assert fits_uniform_layout(spec, get_family("flux.2").decoder_spec).base_width == 12
    assert encoder_base_width(found.require_encoder().spec) == 16
    assert_parity(oracle, found, 32, 48)


@pytest.mark.bench
@pytest.mark.parametrize("decoder_width", [128, 96], ids=["original", "small decoder"])
def test_full_size(decoder_width: int, tmp_path: Path) -> None:
    widths = [decoder_width * multiple for multiple in (1, 2, 4, 4)]
    oracle = random_flux2(flux2_config(128, 32, decoder_block_out_channels=widths))
    found = saved(oracle, tmp_path)
    assert found.require_decoder().spec == get_family("flux.2").decoder_spec(decoder_width, 32)
    assert found.require_encoder().spec == get_family("flux.2").encoder_spec(128, 32)
    assert_parity(oracle, found, 64, 64)


@torch.no_grad()
def test_normalized_latents_are_the_pipelines(tmp_path: Path) -> None:
    """The packed 128 channels of a pipeline, and the same side by side, as 32."""
    oracle: Any = random_flux2(flux2_config())
    saved(oracle, tmp_path)
    vae = flashvaed.load(tmp_path)
    assert len(vae.latent_mean) == 128
    latents = torch.randn(1, 32, 4, 6)
    normalized = packed(oracle, latents)
    side_by_side = diffusers.Flux2Pipeline._unpatchify_latents(normalized)
    raw = vae.decode(latents.unsqueeze(2), scale="raw")
    assert share_of_range(raw.squeeze(2), oracle.decode(latents).sample.clamp(-1, 1)) < 1e-5
    for given in (normalized, side_by_side):
        assert share_of_range(vae.decode(given.unsqueeze(2), scale="normalized"), raw) < 1e-4
    pixels = torch.rand(1, 3, 1, 32, 48) * 2 - 1
    ours = vae.encode(pixels, scale="normalized").squeeze(2)
    theirs = packed(oracle, oracle.encode(pixels.squeeze(2)).latent_dist.mode())
    assert share_of_range(diffusers.Flux2Pipeline._patchify_latents(ours), theirs) < 1e-5
    scrambled = packed(oracle, latents.flip(1))
    assert share_of_range(vae.decode(scrambled.unsqueeze(2), scale="normalized"), raw) > 1e-2


def test_figures_of_a_channel_are_those_of_all_its_places() -> None:
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    patches = torch.randn(20_000, 8, dtype=torch.float64) * std + mean
    means, deviations = per_channel(mean.tolist(), std.tolist(), 2)
    samples = patches.view(-1, 2, 4).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(means), samples.mean(1).float(), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor(deviations), samples.std(1).float(), atol=0.02, rtol=0)


# --- other layouts, and what `export` writes ----------------------------------------------------


@torch.no_grad()
def test_original_and_single_files(tmp_path: Path) -> None:
    """The layers around the latent lie inside the coders of the original file; other keys are those of FLUX.1's."""
    oracle: Any = random_flux2(flux2_config(32, 32))
    found = saved(oracle, tmp_path / "vae")
    succeed("export vae -t safetensors", cwd=tmp_path)
    tensors = load_file(tmp_path / "export" / "vae.safetensors")
    for ours, theirs in (
        ("decoder.post_quant_conv.weight", "post_quant_conv.weight"),
        ("encoder.quant_conv.bias", "quant_conv.bias"),
        ("decoder.up.3.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
        ("bn.running_mean", "bn.running_mean"),
    ):
        assert torch.equal(tensors[ours], oracle.state_dict()[theirs])
    torch.testing.assert_close(tensors["bn.running_var"], oracle.bn.running_var)
    assert "bn.num_batches_tracked" in tensors
    save_file(tensors, tmp_path / "ae.safetensors")  # without our metadata, as it is published
    save_file(oracle.state_dict(), tmp_path / "single.safetensors")
    latents = torch.randn(1, 32, 1, 4, 6)
    expected = decode(found.require_decoder(), latents)
    for name in ("ae.safetensors", "single.safetensors"):
        again = load_checkpoint(tmp_path / name, builtins={})
        assert again.family == "flux.2" and torch.equal(decode(again.require_decoder(), latents), expected)
        torch.testing.assert_close(again.require_statistics(), found.require_statistics())
        assert again.encoder is not None and again.encoder.spec == found.require_encoder().spec


def same_statistics(model: nn.Module, oracle: nn.Module) -> None:
    for name in ("bn.running_mean", "bn.running_var"):
        torch.testing.assert_close(model.get_buffer(name), oracle.get_buffer(name))


@torch.no_grad()
def test_native_students_in_the_stock_class(tmp_path: Path) -> None:
    """A narrower decoder beside the encoder as it was; as many groups in its norms, each narrower."""
    oracle: Any = random_flux2(flux2_config(16))
    saved(oracle, tmp_path / "vae")
    save_file({"latents": torch.randn(32, 1, 6, 8)}, tmp_path / "latents.safetensors")
    words = "--data latents.safetensors --latent-scale raw --num-calibration-clips 1"
    succeed(f"prune vae {words} --layout native --ratio 0.7 -o native.safetensors", cwd=tmp_path)
    student = load_checkpoint(tmp_path / "native.safetensors", builtins={})
    kept = student.kept_channels["mid.0"]
    assert [sum(channel // 16 == group for channel in kept) for group in range(4)] == [12] * 4
    succeed("export native.safetensors -t diffusers", cwd=tmp_path)
    folder = tmp_path / "export" / "diffusers"
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKLFlux2"
    assert (config["block_out_channels"], config["decoder_block_out_channels"]) == ([16, 32, 64, 64], [12, 24, 48, 48])
    model = diffusers.AutoencoderKLFlux2.from_pretrained(folder, low_cpu_mem_usage=False)
    latents, pixels = torch.randn(1, 32, 4, 6), torch.rand(1, 3, 32, 48)
    ours = student.require_decoder()(latents.unsqueeze(2)).squeeze(2)
    assert share_of_range(model.decode(latents).sample, ours) < 1e-5
    assert torch.equal(model.encode(pixels).latent_dist.mode(), oracle.encode(pixels).latent_dist.mode())
    same_statistics(model, oracle)


@torch.no_grad()
def test_pruned_students_and_accelerate(tmp_path: Path) -> None:
    """`AutoencoderFlash` keeps the batch norm that pipelines read."""
    oracle: Any = random_flux2(flux2_config(32, 32))
    found = saved(oracle, tmp_path / "vae")
    spec = found.require_decoder().spec
    narrow = toy_decoder(narrowed_spec(spec, kept_of(spec, ("up2", "up3"))))
    save_checkpoint(tmp_path / "narrow.safetensors", derived_header(found), decoder=narrow)
    succeed("export narrow.safetensors -t diffusers --original vae", cwd=tmp_path)
    flash = diffusers.AutoModel.from_pretrained(str(tmp_path / "export" / "diffusers"), trust_remote_code=True)
    latents = torch.randn(1, 32, 4, 6)
    expected = decode(narrow, latents.unsqueeze(2)).squeeze(2)

    class Pipe:
        vae = oracle

    pipe = Pipe()
    flashvaed.accelerate(pipe, tmp_path / "narrow.safetensors")
    for model in (flash, pipe.vae):
        assert share_of_range(model.decode(latents, return_dict=False)[0], expected) < 1e-5
        same_statistics(model.base, oracle)
        torch.testing.assert_close(model.bn.running_mean, oracle.bn.running_mean)
        assert model.config.batch_norm_eps == 1e-4
