"""A student of the native layout, loaded by diffusers' own class: the same frames."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracles import share_of_range
from safetensors import safe_open
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.run.streaming import encode
from flashvaed_cli.families.registry import FAMILIES, original_like
from flashvaed_cli.families.uniform_layout import encoder_base_width, fits_uniform_layout
from flashvaed_cli.stages.export.comfyui import DECODES_ONLY
from tests.commands import invoke, succeed
from tests.toy import BASE_WIDTH, write_toy_clip, write_toy_vae

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")
NATIVE = [name for name, family in FAMILIES.items() if family.native_obstacle is None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native student with an encoder of its width, exported for every program that builds both at one."""
    folder = tmp_path_factory.mktemp("whole")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    words = "--data clip.mp4 --num-calibration-clips 2 --num-frames 9 --crop-size 64 --layout native --ratio 0.75"
    printed = succeed(f"prune vae.safetensors {words} --with-encoder -o whole.safetensors", cwd=folder)
    assert printed["encoder"]["parameters_after"] < printed["encoder"]["parameters_before"]
    succeed("export whole.safetensors --target diffusers --target safetensors --target comfyui", cwd=folder)
    return folder


@torch.no_grad()
def test_an_encoder_of_the_same_width(whole: Path) -> None:
    checkpoint = load_checkpoint(whole / "whole.safetensors", builtins={})
    encoder = checkpoint.require_encoder()
    assert encoder_base_width(encoder.spec) == 3 * BASE_WIDTH // 4
    pixels = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = diffusers.AutoencoderKLWan.from_pretrained(whole / "export" / "diffusers", low_cpu_mem_usage=False)
    assert (vae.config["base_dim"], vae.config["decoder_base_dim"]) == (3 * BASE_WIDTH // 4,) * 2
    theirs = vae.encode(pixels, return_dict=False)[0].mode()
    assert share_of_range(theirs, encode(encoder, pixels)) < 1e-5


@torch.no_grad()
def test_the_single_file_in_diffusers(whole: Path) -> None:
    checkpoint = load_checkpoint(whole / "whole.safetensors", builtins={})
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    vae = diffusers.AutoencoderKLWan.from_single_file(
        str(whole / "export" / "whole.safetensors"),
        config=str(whole / "export" / "diffusers"),
        local_files_only=True,
        low_cpu_mem_usage=False,
    )
    assert (
        share_of_range(vae.decode(latents, return_dict=False)[0], checkpoint.require_decoder()(latents).clamp(-1, 1))
        < 1e-5
    )


def test_one_file_for_programs_that_build_both_at_one_width(whole: Path, tmp_path: Path) -> None:
    """With the encoder where there is one; else with a stand-in, and that is said in the file and in the card."""
    with safe_open(whole / "export" / "comfyui" / "whole.safetensors", "pt") as file:
        assert DECODES_ONLY not in file.metadata() and file.get_tensor("encoder.conv1.weight").abs().sum() > 0
    for name in ("vae.safetensors", "clip.mp4"):
        shutil.copy(whole / name, tmp_path)
    words = "--data clip.mp4 --num-calibration-clips 1 --num-frames 5 --crop-size 32 --layout native --ratio 0.75"
    succeed(f"prune vae.safetensors {words}", cwd=tmp_path)
    printed = succeed("export --target comfyui", cwd=tmp_path)
    assert any("decodes only" in note for note in printed["notes"])
    with safe_open(tmp_path / "export" / "comfyui" / "pruned.safetensors", "pt") as file:
        assert file.metadata()[DECODES_ONLY] == "true"
        assert file.get_slice("encoder.conv1.weight").get_shape()[0] == 3 * BASE_WIDTH // 4
    assert "decodes only" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")


def test_an_encoder_needs_the_native_layout_and_videos(whole: Path) -> None:
    result = invoke("prune vae.safetensors --with-encoder --ratio 0.5 -q", cwd=whole)
    assert result.exit_code == 2 and "native" in result.stderr
    save_file({"latents": torch.randn(16, 2, 4, 6)}, whole / "latents.safetensors")
    words = "--data latents.safetensors --layout native --ratio 0.75 --with-encoder -o x.safetensors -q"
    result = invoke(f"prune vae.safetensors {words}", cwd=whole)
    assert result.exit_code == 2 and "Add a video" in result.stderr


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NATIVE if name != "flux.2"])  # see test_flux2_diffusers
def test_the_stock_class_loads_a_native_student(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    base_width = 16 if family.config_keys.entry_is_latent else 8  # its encoder begins as wide as the latent
    torch.manual_seed(0)
    coders = Decoder(family.decoder_spec(base_width, 16)), Encoder(family.encoder_spec(base_width, 16))
    for coder in coders:
        coder.eval().requires_grad_(False)
    header = ArtifactHeader(kind="vae", family=name, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16)
    save_checkpoint(tmp_path / "vae.safetensors", header, decoder=coders[0], encoder=coders[1])
    num_latents = 1 if coders[0].spec.still else 2
    latents = torch.randn(1, 16, num_latents, 4, 6, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents[0]}, tmp_path / "latents.safetensors")
    words = "--data latents.safetensors --latent-scale raw --layout native --ratio 0.5 --num-calibration-clips 1"
    succeed(f"prune vae.safetensors {words} -o native.safetensors", cwd=tmp_path)
    succeed("export native.safetensors --target diffusers", cwd=tmp_path)
    student = load_checkpoint(tmp_path / "native.safetensors", builtins={}).require_decoder()
    assert fits_uniform_layout(student.spec, original_like(student.spec)).base_width == base_width // 2
    config = json.loads((tmp_path / "export" / "diffusers" / "config.json").read_text())
    vae = getattr(diffusers, config["_class_name"]).from_pretrained(
        tmp_path / "export" / "diffusers", low_cpu_mem_usage=False
    )
    time = student.spec.decode_timestep
    told = {} if time is None else {"temb": torch.tensor([time])}
    vae, student, latents = vae.double(), student.double(), latents.double()  # rounding differs between processors
    theirs = vae.decode(latents, return_dict=False, **told)[0][:, :3]
    ours = student(latents)
    if not config["_class_name"].startswith("AutoencoderKLLTX"):
        ours = ours.clamp(-1, 1)
    assert share_of_range(theirs, ours) < 1e-5
