"""Frames and sides that do not fit the VAE: one line says what is taken instead; what leaves nothing is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import JUDGING, invoke, read_report, succeed
from tests.toy import write_toy_clip, write_toy_vae

LATENCY = "--latency-frames 1 --latency-side 16 --num-latency-rounds 1 --width-latency-s 0"
FEW_CLIPS = "--num-calibration-clips 2"
COMMANDS = {
    "analyze": f"analyze vae.safetensors {FEW_CLIPS} {LATENCY}",
    "prune": f"prune vae.safetensors --ratio 0.5 --reconstruct none {FEW_CLIPS}",
    "convert-ops": f"convert-ops vae.safetensors --operator up3=frame2d --reconstruct channel {FEW_CLIPS}",
    "distill": "distill vae.safetensors --phase 3 --num-steps 1 --num-clips 2 --batch-size 1 --loss-weight lpips=0 "
    "--validation-data other.mp4",
}
ODD = "--num-frames 4 --crop-size 30 --max-side 39"
SAID = (
    "Warning: --num-frames 4 is taken as 1 and --crop-size 30 is taken as 24 and --max-side 39 is taken as 32: this "
    "decoder takes 1 + 4 n frames and sides that 8 divides\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    write_toy_clip(folder / "other.mp4")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_rounded_is_said_once(folder: Path, tmp_path: Path, command: str) -> None:
    words = f"{COMMANDS[command]} --data clip.mp4 -o '{tmp_path / 'out.safetensors'}'"
    rounded = succeed(f"{words} {ODD}", cwd=folder)
    assert rounded["stderr"].count(SAID) == 1
    if command == "distill":
        assert rounded["data"]["num_clips_by_latent_size"] == {"1x3x3": 2}
    for flag in ("--crop-size 7", "--max-side 7"):
        refused = invoke(f"{words} {flag} --force", cwd=folder)
        assert refused.exit_code == 2
        assert f"{flag} leaves nothing: a latent covers 8 × 8 pixels. Give 8 or more" in refused.stderr


def test_sizes_that_are_timed_are_rounded_up_and_said(folder: Path, tmp_path: Path) -> None:
    timed = "--latency-frames 4 --latency-side 17"
    words = f"--data clip.mp4 -o '{tmp_path / 'a.safetensors'}'"
    analysis = succeed(f"{COMMANDS['analyze']} --num-frames 1 --crop-size 24 {timed} {words}", cwd=folder)
    said = (
        "Warning: --latency-frames 4 is timed as 5 and --latency-side 17 is timed as 24: this "
        "decoder takes 1 + 4 n frames and sides that 8 divides\n"
    )
    assert analysis["stderr"] == said
    assert (analysis["clips"]["latency_frames"], analysis["clips"]["latency_side"]) == (5, 24)
    prune = "prune vae.safetensors --target-gflops 0.03 --reconstruct none --num-frames 1 --crop-size 24"
    pruned = succeed(f"{prune} {FEW_CLIPS} {timed} {words} --force", cwd=folder)
    assert pruned["stderr"] == said
    assert (pruned["budget"]["num_frames"], pruned["budget"]["side"]) == (5, 24)


def test_widths_that_rounding_leaves_whole_are_said(folder: Path, tmp_path: Path) -> None:
    prune = f"prune vae.safetensors --reconstruct none {FEW_CLIPS} --num-frames 1 --crop-size 24 --data clip.mp4"
    words = f"{prune} -o '{tmp_path / 'a.safetensors'}' -q --force"  # 8 channels in up2, 4 in up3
    some = invoke(f"{words} --ratio 0.3 --round-to 4", cwd=folder)
    assert some.exit_code == 0
    assert "up3.stream (0.3 of 4), up3.0.inner (0.3 of 4)" in some.stderr and "up2" not in some.stderr
    assert "the nearest multiple of --round-to 4 above 0 is all of them, so they stay as they are" in some.stderr
    none = invoke(f"{words} --ratio 0.3 --round-to 8", cwd=folder)
    assert none.exit_code == 2 and "nothing to prune: up2.stream (0.3 of 8)" in none.stderr
    fine = invoke(f"{words} --ratio up3=0.9", cwd=folder)
    assert fine.exit_code == 2 and "the nearest whole number of channels is all of them" in fine.stderr
    meant = invoke(f"{words} --ratio up2=0.5 --ratio up3=1", cwd=folder)
    assert meant.exit_code == 0 and meant.stderr == ""


def test_the_rounded_sizes_are_those_that_are_taken(folder: Path, tmp_path: Path) -> None:
    """Asking for what is taken gives the same statistics, and no word is said."""
    words = f"{COMMANDS['analyze']} --data clip.mp4 -o '{tmp_path / 'a.safetensors'}' --force"
    odd, whole = (
        succeed(f"{words} {sizes}", cwd=folder) for sizes in (ODD, "--num-frames 1 --crop-size 24 --max-side 32")
    )
    assert whole["stderr"] == ""
    assert odd["clips"]["positions"] == whole["clips"]["positions"]
    assert [group["r2"] for group in odd["groups"]] == [group["r2"] for group in whole["groups"]]


def test_eval_judges_exactly_as_many_frames_as_asked_for(folder: Path, tmp_path: Path) -> None:
    save_file({"latents": torch.randn(16, 3, 4, 5)}, tmp_path / "latents.safetensors")
    for data, sides in (("clip.mp4", (32, 40)), (str(tmp_path / "latents.safetensors"), (32, 40))):
        words = f"eval vae.safetensors --data '{data}' --num-frames 4 -o '{tmp_path / 'report'}' {JUDGING} -f"
        succeed(words, cwd=folder)
        (clip,) = read_report(tmp_path / "report")["clips"]
        assert (clip["num_frames"], (clip["height"], clip["width"])) == (4, sides)
    refused = invoke(f"eval vae.safetensors --data clip.mp4 --max-side 7 {JUDGING}", cwd=folder)
    assert refused.exit_code == 2 and "--max-side 7 leaves nothing" in refused.stderr


def test_sizes_that_buckets_replace_are_not_rounded(folder: Path, tmp_path: Path) -> None:
    words = COMMANDS["distill"].replace("--validation-data other.mp4", "")
    printed = succeed(
        f"{words} --data clip.mp4 --bucket 5x16x16 --num-frames 4 --crop-size 3 -o '{tmp_path / 'out.safetensors'}'",
        cwd=folder,
    )
    assert printed["stderr"] == ""
