"""A student of the native layout, loaded by diffusers' own class: the same frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import share_of_range
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from tests.commands import succeed
from tests.toy import BASE_WIDTH, write_toy_vae

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")


@torch.no_grad()
def test_the_stock_class_loads_a_native_student(tmp_path: Path) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents[0]}, tmp_path / "latents.safetensors")
    # Half would leave a norm 2 channels, where vectors near zero cost float32 its fifth digit.
    words = "--data latents.safetensors --latent-scale raw --layout native --ratio 0.75"
    succeed(f"prune vae.safetensors {words} -o native.safetensors", cwd=tmp_path)
    succeed("export native.safetensors --target diffusers", cwd=tmp_path)
    student = load_checkpoint(tmp_path / "native.safetensors", builtins={}).require_decoder()
    vae = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "export" / "diffusers", low_cpu_mem_usage=False)
    assert vae.config["decoder_base_dim"] == 3 * BASE_WIDTH // 4
    assert share_of_range(vae.decode(latents, return_dict=False)[0], student(latents).clamp(-1, 1)) < 1e-5
