"""`convert-ops --time-rank`: factors in our artifacts, whole kernels in the original's layout."""

from __future__ import annotations

from pathlib import Path

import torch

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.store import read_header
from tests.commands import invoke, succeed
from tests.toy import BASE_WIDTH, write_toy_vae

STAGES = " ".join(f"--operator {stage}=causal3d" for stage in ("mid", "up0", "up1", "up2", "up3"))


def test_factors_are_written_and_exported_as_kernels(tmp_path: Path) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    succeed(f"convert-ops vae.safetensors {STAGES} --time-rank 0.25 --reconstruct none", cwd=tmp_path)
    rank = 2 * BASE_WIDTH  # a quarter of 2 x 4 x base width
    measured = read_header(tmp_path / "converted.safetensors").measured
    assert measured["time_ranks"] == {"up0.3.temporal": rank, "up1.3.temporal": rank}
    assert measured["gflop_9x256x256_after"] < measured["gflop_9x256x256_before"]
    printed = succeed("export --target safetensors", cwd=tmp_path)
    assert any("low-rank time_conv layers are written as whole kernels" in note for note in printed["notes"])
    written = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert written == ["README.md", "converted.safetensors", "export.json"]
    ours, theirs = (
        load_checkpoint(tmp_path / name, builtins={}).require_decoder()
        for name in ("converted.safetensors", "export/converted.safetensors")
    )
    assert {layer.operator for _, layer in theirs.spec.layers()} <= {"causal3d", "frame2d", "pointwise"}
    latents = torch.randn(1, 16, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(latents), theirs(latents), rtol=0, atol=1e-4)


def test_a_rank_that_does_not_pay_is_a_mistake(tmp_path: Path) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    result = invoke("convert-ops vae.safetensors --time-rank 0.9 --reconstruct none", cwd=tmp_path)
    assert result.exit_code == 2 and "costs more than the kernel itself" in result.stderr
