"""What identifies an artifact: its content, not how or when it was made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashvaed_cli.artifact.run_record import DataFile, RunRecord
from flashvaed_cli.artifact.store import content_sha256, read_header, sha256_of, write_artifact
from tests.unit.artifact.test_header import header

RUN = RunRecord(torch="2.6", device="cpu", num_threads=2, started="2026-01-01T00:00:00+00:00", duration_s=1.5)
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def written(path: Path, tensors: dict[str, torch.Tensor] = TENSORS, **changes: object) -> Path:
    write_artifact(path, tensors, header(**{"run": RUN, **changes}))
    return path


def test_the_way_of_making_it_plays_no_role(tmp_path: Path) -> None:
    one = written(tmp_path / "a.safetensors", command_line="flashvaed prune")
    later = RUN.model_copy(update={"duration_s": 9.0, "data": (DataFile(name="x", size_bytes=1),)})
    other = written(tmp_path / "b.safetensors", command_line="flashvaed prune -q", run=later)
    assert content_sha256(one) == content_sha256(other)
    assert sha256_of(one) != sha256_of(other)
    assert read_header(other).run == later


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 4},
        {"measured": {"x": 1}},
        {"tensors": {**TENSORS, "a": TENSORS["a"] + 1}},
        {"tensors": {"c": TENSORS["a"], "b": TENSORS["b"]}},
        {"tensors": {**TENSORS, "a": TENSORS["a"].reshape(3, 2)}},
    ],
    ids=["seed", "figures", "values", "names", "shapes"],
)
def test_all_else_does(tmp_path: Path, changed: dict) -> None:
    one = written(tmp_path / "a.safetensors")
    assert content_sha256(one) != content_sha256(written(tmp_path / "b.safetensors", **changed))


def test_files_without_a_run_are_hashed_whole(tmp_path: Path) -> None:
    """As version 0.3 did: what it recorded still fits."""
    path = written(tmp_path / "a.safetensors", run=None)
    assert content_sha256(path) == sha256_of(path)
    (tmp_path / "b.bin").write_bytes(b"any")
    assert content_sha256(tmp_path / "b.bin") == sha256_of(tmp_path / "b.bin")
