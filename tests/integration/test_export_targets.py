"""`export` of several formats: what one failure leaves, what the files are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flashvaed_cli.errors import ExportError
from flashvaed_cli.stages.export import run as export_stage
from flashvaed_cli.stages.export.run import export_name
from tests.commands import invoke, strict_json, succeed
from tests.toy import write_toy_vae


def failing(*_given: object, **_options: object) -> None:
    raise ExportError("vae.onnx in onnxruntime differs, so it was not written. Use another target")


def test_one_failure_leaves_the_other_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    monkeypatch.setattr(export_stage, "export_onnx", failing)
    result = invoke("export vae.safetensors --json --quiet", cwd=tmp_path)
    assert result.exit_code == 2
    error = " ".join(result.stderr.split())
    assert "not every format could be written" in error and "vae.onnx in onnxruntime differs" in error
    printed = strict_json(result.stdout)
    assert printed["failed"] == [
        {"target": "onnx", "reason": "vae.onnx in onnxruntime differs, so it was not written. Use another target"}
    ]
    written = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "export").rglob("*") if path.is_file()}
    folder = {"export/diffusers/config.json", "export/diffusers/diffusion_pytorch_model.safetensors"}
    assert written == {"export/vae.safetensors", "export/export.json", "export/README.md", *folder}
    assert set(printed["paths"]) == written
    manifest = json.loads((tmp_path / "export" / "export.json").read_text())
    assert [row["target"] for row in manifest["files"]] == ["safetensors", "diffusers"]
    assert manifest["failed"] == printed["failed"]

    again = succeed(
        "export vae.safetensors -t safetensors -t diffusers --seed 1 --force", cwd=tmp_path
    )  # into the same folder
    assert again["failed"] == [] and set(again["paths"]) == written


def test_nothing_is_written_where_every_format_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    monkeypatch.setattr(export_stage, "export_onnx", failing)
    result = invoke("export vae.safetensors -t onnx", cwd=tmp_path)
    assert result.exit_code == 2 and "nothing was written: vae.onnx in" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["vae.safetensors"]


def test_the_folder_has_a_model_card_and_stable_records(tmp_path: Path) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    succeed("export vae.safetensors -t safetensors -t comfyui", cwd=tmp_path)
    _, front, card = (tmp_path / "export/README.md").read_text().split("---\n", 2)
    known = yaml.safe_load(front)
    assert known["base_model"] == "Wan-AI/Wan2.1-T2V-14B" and known["license"] == "apache-2.0"
    assert "comfyui/vae.safetensors" in card and "How it was made" in card
    records = json.loads((tmp_path / "export/export.json").read_text())["files"]
    for record, name in zip(records, ("vae.safetensors", "comfyui/vae.safetensors"), strict=True):
        assert record["files"] == [name]
        assert record["size_bytes"] == (tmp_path / "export" / name).stat().st_size
        assert 0 <= record["max_difference_of_range"] <= record["allowed_difference_of_range"]
        assert "torch" in record["checked_with"]


def test_onnx_has_no_bfloat16(tmp_path: Path) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    written = succeed("export vae.safetensors --dtype bfloat16", cwd=tmp_path)
    assert [row["target"] for row in written["files"]] == ["safetensors", "diffusers"] and written["failed"] == []
    assert any("ONNX" in note for note in written["notes"])
    asked = invoke("export vae.safetensors --dtype bfloat16 -t onnx -o onnx", cwd=tmp_path)
    assert asked.exit_code == 2 and "not bfloat16" in " ".join(asked.stderr.split())


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("ltx0.9.0", "ltx0.9.0"),
        ("ltx0.9.1/", "ltx0.9.1"),
        ("models/flash.v2.safetensors", "flash.v2"),
        ("Wan2.1_VAE.pth", "Wan2.1_VAE"),
        ("Wan2.1_VAE", "Wan2.1_VAE"),
        ("builtin:tiny-wan", "builtin-tiny-wan"),
        ("hf://Wan-AI/Wan2.1-T2V-14B/Wan2.1_VAE.pth", "Wan2.1_VAE"),
        ("hf://Wan-AI/Wan2.2-TI2V-5B-Diffusers/vae", "vae"),
        ("hf://owner/ltx-0.9.1@main", "ltx-0.9.1@main"),
        ("folder.safetensors", "folder.safetensors"),
    ],
)
def test_names(location: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("ltx0.9.0", "ltx0.9.1", "folder.safetensors"):
        Path(folder).mkdir()
    assert export_name(location) == name


def test_the_name_of_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ltx0.9.1").mkdir()
    monkeypatch.chdir(tmp_path / "ltx0.9.1")
    assert export_name(".") == "ltx0.9.1"


def test_what_others_put_under_our_names_is_left_alone(tmp_path: Path) -> None:
    """A manifest of ours speaks for the files that it has the hashes of, and for no others."""
    write_toy_vae(tmp_path / "vae.safetensors")
    words = "export vae.safetensors -t safetensors"
    succeed(words, cwd=tmp_path)
    succeed(words, cwd=tmp_path)
    for name in ("README.md", "vae.safetensors"):
        file = tmp_path / "export" / name
        written = file.read_bytes()
        file.write_bytes(b"mine")
        result = invoke(f"{words} -q", cwd=tmp_path)
        assert result.exit_code == 2 and f"{name} was not written by flashvaed, or was changed since" in result.stderr
        assert file.read_bytes() == b"mine"
        file.write_bytes(written)
    (tmp_path / "export" / "README.md").write_bytes(b"mine")
    succeed(f"{words} --force", cwd=tmp_path)
    assert (tmp_path / "export" / "README.md").read_bytes() != b"mine"
