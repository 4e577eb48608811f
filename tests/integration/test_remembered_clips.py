"""Commands that calibrate on the same clips encode them once, and write the same bytes as if they had not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from flashvaed_cli.stages.common import clips
from tests.commands import CALIBRATION, invoke, succeed
from tests.toy import write_toy_clip, write_toy_vae

DATA = f"--data clip.mp4 {CALIBRATION}"
ANALYZE = (
    f"analyze vae.safetensors {DATA} --latency-frames 1 --latency-side 16 --num-latency-rounds 1 --width-latency-s 0"
)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The clips that are encoded."""
    found: list[object] = []
    plain = clips.encode_clip

    def counting(vae, clip, device):
        found.append(clip)
        return plain(vae, clip, device)

    monkeypatch.setattr(clips, "encode_clip", counting)
    return found


def prune(folder: Path, output: str, more: str = "") -> dict[str, bytes]:
    """Prune, and return the bytes of the weights."""
    succeed(f"prune vae.safetensors --ratio 0.5 {DATA} --force -o {output} {more}", cwd=folder)
    return weights(folder / output)


def weights(path: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(path).items()}


def test_clips_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[object]) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    plain = prune(tmp_path, "plain.safetensors")
    per_run = len(encoded)
    monkeypatch.setenv("FLASHVAED_CACHE", str(tmp_path / "cache"))
    encoded.clear()
    succeed(f"{ANALYZE} --width-latency-s 0", cwd=tmp_path)
    by_analysis = len(encoded)
    assert 0 < by_analysis < per_run
    first = invoke(f"prune vae.safetensors --ratio 0.5 {DATA} -o first.safetensors", cwd=tmp_path)
    assert first.exit_code == 0
    assert " ".join(first.stderr.split()).count("clips that were encoded before come from") == 1
    in_all = len(encoded)
    assert by_analysis < in_all < per_run + by_analysis  # the held-out clips are new
    assert weights(tmp_path / "first.safetensors") == plain
    succeed(f"convert-ops first.safetensors {DATA}", cwd=tmp_path)
    assert prune(tmp_path, "again.safetensors") == plain
    assert len(encoded) == in_all


@pytest.mark.parametrize("change", ["clip", "vae", "cut"])
def test_what_changed_is_encoded_again(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[object]
) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    monkeypatch.setenv("FLASHVAED_CACHE", str(tmp_path / "cache"))
    before = prune(tmp_path, "a.safetensors")
    per_run = len(encoded)
    encoded.clear()
    more = ""
    if change == "clip":
        write_toy_clip(tmp_path / "other.mp4", num_frames=13)
        shutil.move(tmp_path / "other.mp4", tmp_path / "clip.mp4")
        os.utime(tmp_path / "clip.mp4", (1, 1))
    elif change == "vae":
        write_toy_vae(tmp_path / "vae.safetensors", seed=1)
    else:
        more = "--seed 5"
    assert prune(tmp_path, "a.safetensors", more) != before
    assert encoded and (change == "cut" or len(encoded) == per_run)
