"""The six commands on small VAEs of Wan 2.2 and Qwen-Image, given as diffusers folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.artifact.layouts import Layout, to_foreign
from flashvaed_cli.artifact.wan22_keys import WAN22_DIFFUSERS
from flashvaed_cli.artifact.wan_keys import QWEN_DIFFUSERS, QWEN_ORIGINAL
from flashvaed_cli.decoders.coder import Decoder, Encoder
from flashvaed_cli.decoders.families import get_family
from flashvaed_cli.decoders.streaming import decode
from flashvaed_cli.media.procedural import render_frames
from tests.commands import invoke, read_report, succeed
from tests.toy import fill_, write_toy_clip

CALIBRATION = "--num-calibration-clips 2 --num-frames 5 --crop-size 48"
TRAINING = "--num-clips 2 --num-frames 5 --crop-size 48 --batch-size 1 --loss-weight lpips=0 --num-steps 2"


def write_vae(path: Path, layout: Layout, config: dict | None) -> None:
    """A VAE of base width 4 with random weights: a folder with its configuration, or a bare file without."""
    family = get_family(layout.family)
    tensors: dict[str, torch.Tensor] = {}
    latent_width = family.latent_width
    for coder in (Decoder(family.decoder_spec(4, latent_width)), Encoder(family.encoder_spec(4, latent_width))):
        fill_(coder.requires_grad_(False))
        tensors |= {name: value.clone() for name, value in to_foreign(coder.state_dict(), coder.spec, layout).items()}
    if config is None:
        save_file(tensors, path)
        return
    path.mkdir()
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    statistics = {"latents_mean": family.latent_mean, "latents_std": family.latent_std, "z_dim": latent_width}
    written = {"_class_name": layout.config_class, "base_dim": 4, **statistics, **config}
    (path / "config.json").write_text(json.dumps(written))


def loaded(folder: Path, name: str) -> Checkpoint:
    return load_checkpoint(folder / name, builtins={})


def test_wan22(tmp_path: Path) -> None:
    write_vae(tmp_path / "vae", WAN22_DIFFUSERS, {"is_residual": True, "patch_size": 2, "decoder_base_dim": 4})
    write_toy_clip(tmp_path / "clip.mp4", 5, 48, 56)
    succeed(
        f"analyze vae --data clip.mp4 {CALIBRATION} --latency-frames 5 --latency-side 32 --num-latency-rounds 1 "
        "--width-latency-s 1",
        cwd=tmp_path,
    )
    pruned = succeed(f"prune vae --target-gflops 0.012 --data clip.mp4 {CALIBRATION}", cwd=tmp_path)
    assert "up2.3.bypass" in str(pruned) and pruned["budget"]
    succeed(f"convert-ops --data clip.mp4 {CALIBRATION} --num-separable-iterations 1", cwd=tmp_path)
    succeed(f"distill --data clip.mp4 {TRAINING}", cwd=tmp_path)
    succeed("eval --data clip.mp4 --num-speed-rounds 1 --lpips off", cwd=tmp_path)
    succeed("export --target safetensors", cwd=tmp_path)
    vae, flash = loaded(tmp_path, "vae"), loaded(tmp_path, "flash.safetensors")
    assert (vae.family, flash.family) == ("wan2.2", "wan2.2")
    spec = flash.require_decoder().spec
    assert (spec.patch, spec.spatial_factor) == (2, 16)
    assert spec.stage("up2").bypass is not None and spec.stage("up2").bypass.conv is not None  # type: ignore[union-attr]
    operators = {address: layer.operator for address, layer in spec.layers()}
    assert operators["mid.0.conv1"] == operators["up1.2.conv2"] == "dwsep3d" and operators["up3.0.conv1"] == "frame2d"
    assert {row["num_frames"] for row in read_report(tmp_path / "report")["clips"]} == {5}
    again = loaded(tmp_path, "export/flash.safetensors")
    assert again.family == "wan2.2" and again.require_decoder().spec == spec


def test_qwen_images(tmp_path: Path) -> None:
    from PIL import Image

    write_vae(tmp_path / "vae", QWEN_DIFFUSERS, {})
    for index, frame in enumerate(render_frames(2, 48, 56)):
        Image.fromarray(((frame + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"image{index}.png")
    data = "--data image0.png --data image1.png"
    converted = succeed("convert-ops vae --profile image --output images.safetensors", cwd=tmp_path)
    assert converted["max_difference_of_range"] < 1e-6
    calibration = "--num-calibration-clips 2 --crop-size 48"
    succeed(f"analyze images.safetensors {data} {calibration} --width-latency-s 0 --latency-side 32", cwd=tmp_path)
    succeed(f"prune images.safetensors --ratio 0.5 {data} {calibration}", cwd=tmp_path)
    succeed(f"convert-ops {data} {calibration} --num-separable-iterations 1", cwd=tmp_path)
    succeed(f"distill {data} {TRAINING.replace('--num-frames 5', '')}", cwd=tmp_path)
    succeed(f"eval {data} --num-speed-rounds 1 --lpips off", cwd=tmp_path)
    succeed("export --target safetensors", cwd=tmp_path)
    vae, still = loaded(tmp_path, "vae"), loaded(tmp_path, "images.safetensors")
    assert (vae.family, still.family) == ("qwen-image", "qwen-image")
    latents = torch.randn(1, 16, 1, 3, 4)
    difference = decode(still.require_decoder(), latents) - decode(vae.require_decoder(), latents)
    assert difference.abs().max() < 1e-5
    flash = loaded(tmp_path, "flash.safetensors").require_decoder().spec
    assert flash.still and {layer.kernel[0] for _, layer in flash.layers()} == {1}
    assert dict(flash.layers())["mid.0.conv1"].operator == "dwsep3d"
    again = loaded(tmp_path, "export/flash.safetensors")
    assert again.require_decoder().spec == flash
    refused = invoke("eval --speed --frames 9 --sizes 32x32", cwd=tmp_path)
    assert refused.exit_code == 2 and "single images takes 1 latent frame" in " ".join(refused.stderr.split())


def test_a_bare_file_of_two_families_is_said_to_be_so(tmp_path: Path) -> None:
    write_vae(tmp_path / "qwen.safetensors", QWEN_ORIGINAL, None)
    words = "convert-ops qwen.safetensors --profile image"
    told = invoke(f"{words} --output a.safetensors", cwd=tmp_path)
    assert told.exit_code == 0 and "taken as wan2.1 (--family qwen-image" in " ".join(told.stderr.split())
    quiet = invoke(f"{words} --family qwen-image --output b.safetensors", cwd=tmp_path)
    assert quiet.exit_code == 0 and "taken as" not in quiet.stderr
    assert [loaded(tmp_path, f"{name}.safetensors").family for name in "ab"] == ["wan2.1", "qwen-image"]
    wrong = invoke(f"{words} --family wan2.2 --force", cwd=tmp_path)
    assert wrong.exit_code == 2 and "wan2.2-original: no tensor named" in " ".join(wrong.stderr.split())
    assert pytest.approx(loaded(tmp_path, "a.safetensors").latent_mean) == loaded(tmp_path, "b.safetensors").latent_mean
