"""Ctrl-C in the middle of an export: its folder is written whole or not at all."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from flashvaed_cli.stages.export import run as export_stage
from tests.commands import invoke, succeed
from tests.toy import write_toy_vae


def test_an_interrupt_between_two_targets_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    drafts: list[list[str]] = []

    def interrupted(_decoder: object, path: Path, **_options: object) -> None:
        drafts.append([file.name for file in path.parent.iterdir()])
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(export_stage, "export_onnx", interrupted)
    words = "export vae.safetensors --target safetensors --target onnx --output out"
    result = invoke(words, cwd=tmp_path)
    assert result.exit_code == 130
    assert "interrupted: nothing was written to out" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["vae.safetensors"]

    succeed("export vae.safetensors --target safetensors --seed 1 --output out", cwd=tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before.keys() == {"vae.safetensors", "export.json", "README.md"}
    assert invoke(f"{words} --dtype float16 --force", cwd=tmp_path).exit_code == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "vae.safetensors"]
    assert drafts == [["vae.safetensors"]] * 2  # the first target had been written each time
