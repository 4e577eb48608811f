"""An LTX file without latent statistics: raw latents work, normalized ones say what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.families.registry import original_layout
from tests.commands import JUDGING, invoke, succeed
from tests.ltx_toy import LATENT_WIDTH, VERSIONS, ltx_decoder, ltx_spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    decoder = ltx_decoder(ltx_spec(VERSIONS[0]))
    tensors = to_foreign(decoder.state_dict(), decoder.spec, original_layout(VERSIONS[0]))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "ltx.safetensors")
    save_file({"latents": torch.randn(1, LATENT_WIDTH, 1, 1, 1)}, tmp_path / "clip.safetensors")
    return tmp_path


def test_normalized_latents_need_statistics_and_raw_ones_do_not(folder: Path) -> None:
    words = f"eval ltx.safetensors --data clip.safetensors --no-video {JUDGING}"
    refused = invoke(words, cwd=folder)
    assert refused.exit_code == 2
    assert "no latent statistics (per_channel_statistics.*" in refused.stderr.replace("\n", " ")
    assert "--latent-scale raw" in refused.stderr.replace("\n", " ")
    assert "only raw latents can be read" in succeed(f"{words} --latent-scale raw", cwd=folder)["stderr"].replace(
        "\n", " "
    )


def test_what_needs_none_works(folder: Path) -> None:
    succeed("convert-ops ltx.safetensors --profile exact -o exact.safetensors", cwd=folder)
    succeed("export exact.safetensors --target safetensors", cwd=folder)
    again = invoke("convert-ops export/exact.safetensors --profile exact -o again.safetensors", cwd=folder)
    assert again.exit_code == 0, again.stderr
    assert "only raw latents can be read" in again.stderr.replace("\n", " ")
