"""`--dry-run` says what the command then does, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashvaed_cli.artifact.store import read_header
from flashvaed_cli.decoders.spec.groups import channel_groups
from tests.commands import CALIBRATION, TRAINING, invoke, succeed
from tests.toy import write_toy_clip, write_toy_vae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("words", ["--ratio up3=0.5 --ratio up2=3/4", "--layout native --ratio 1/2"])
def test_prunes_widths_are_those_that_it_makes(folder: Path, words: str) -> None:
    command = f"prune vae.safetensors --data clip.mp4 {CALIBRATION} {words}"
    before = files(folder)
    promised = succeed(f"{command} --dry-run", cwd=folder)
    assert files(folder) == before
    assert promised["kind"] == "flashvaed-dry-run" and promised["paths"] == []
    assert promised["would_read"] == "vae.safetensors, clip.mp4" and promised["would_write"] == "pruned.safetensors"
    made = succeed(command, cwd=folder)
    spec = read_header(folder / "pruned.safetensors").decoder
    assert spec is not None
    assert promised["widths"] == {group.name: group.width for group in channel_groups(spec)}
    shown = promised["GFLOP_for_such_a_clip"].split(" to ")
    assert shown == [f"{made['held_out'][key]:.1f}" for key in ("gflop_before", "gflop_after")]
    assert promised["seconds"] > 0 and promised["memory_bytes"] > 1e6


def test_convert_ops_and_distill(folder: Path) -> None:
    before = files(folder)
    convert = succeed(f"convert-ops vae.safetensors --data clip.mp4 {CALIBRATION} -n", cwd=folder)
    assert int(convert["layers_to_fit"]) > 10
    exact = succeed("convert-ops vae.safetensors --profile exact --dry-run", cwd=folder)
    assert exact["would_write"] == "converted.safetensors"
    distill = succeed(f"distill vae.safetensors --phase 3 --num-steps 7 --data clip.mp4 {TRAINING} -n", cwd=folder)
    assert distill["num_steps"] == 7 and distill["phases"] == "3 (7 steps)"
    assert files(folder) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ratio upp3=0.5", "no stage 'upp3'"),
        ("--target-gflops 0.03", "follow from measurements"),
        ("--ratio up3=0.1", "keeps none of 4 channels"),
        ("--data nowhere.mp4", "nowhere.mp4 does not exist"),
    ],
)
def test_mistakes_are_those_of_the_command(folder: Path, words: str, message: str) -> None:
    result = invoke(f"prune vae.safetensors --data clip.mp4 {words} --dry-run", cwd=folder)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
