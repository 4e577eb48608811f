"""Several phases in one run: what is done stays done, and what a run leaves to look at."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flashvaed_cli.artifact.store import read_artifact
from flashvaed_cli.distill.checkpoint import checkpoint_state
from flashvaed_cli.errors import MediaError
from flashvaed_cli.stages.distill.data import TrainingData
from flashvaed_cli.stages.distill.files import TrainingFiles
from tests.commands import TRAINING, invoke, succeed
from tests.toy import write_toy_clip, write_toy_vae

RECIPE = """
steps:
  - distill:
      input: vae.safetensors
      data: clip.mp4
      phases:
        - {phase: 2, num_steps: 2, learning_rate: 1e-3}
        - {phase: 3, num_steps: 3, learning_rate: 1e-3}
      stage_keep_ratios: {up3: 0.5}
      ema_decay: 0.9
      gradient_accumulation: 2
      checkpoint_every_steps: 1
"""
DISTILL = f"distill --recipe two.yaml {TRAINING}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    (tmp_path / "two.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def log_of(folder: Path) -> list[dict]:
    header, *entries = map(json.loads, (folder / "flash.log.jsonl").read_text(encoding="utf-8").splitlines())
    assert set(header) == {"run_key"}
    return entries


def dying_in(phase_index: int, step: int, draw: Callable) -> Callable:
    """The data of a run that ends in a step of one of its phases, with no time to save."""

    def dying_draw(data: TrainingData, *, seed: int, **settings: int) -> Callable[[int], tuple[Tensor, ...]]:
        batches = draw(data, seed=seed, **settings)

        def batch(number: int) -> tuple[Tensor, ...]:
            if (seed, number) == (phase_index - 1, step):
                raise MediaError("killed")
            return batches(number)

        return batch

    return dying_draw


def test_a_run_killed_in_its_second_phase_keeps_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed(f"{DISTILL} --output whole.safetensors", cwd=folder)
    _, expected = read_artifact(folder / "whole.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "draw", dying_in(2, 2, TrainingData.draw))
        assert "killed" in invoke(DISTILL, cwd=folder).stderr
    assert {path.name for path in folder.glob("*.ckpt")} == {"flash.phase1.ckpt", "flash.phase2.ckpt"}
    with monkeypatch.context() as patch:  # the first phase draws nothing any more
        patch.setattr(TrainingData, "draw", dying_in(1, 0, TrainingData.draw))
        resumed = succeed(DISTILL, cwd=folder)
    assert [phase["resumed_from"] for phase in resumed["phases"]] == [2, 2]
    assert [len(phase["history"]) for phase in resumed["phases"]] == [1, 1]
    assert not list(folder.glob("*.ckpt"))
    _, weights = read_artifact(folder / "flash.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    log = log_of(folder)
    assert [(entry["index"], entry["phase"], entry["step"]) for entry in log] == [(1, 2, 2), (2, 3, 3)]
    assert {"loss", "psnr_db", "l_ce", "gradient_norm"} <= set(log[0])
    # An original moves away from what it was, which its teacher remains.
    assert log[1]["l1"] > 0 and log[1]["psnr_db"] < 100


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was killed in the last step of its second phase."""
    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "draw", dying_in(2, 2, TrainingData.draw))
        assert "killed" in invoke(DISTILL, cwd=folder).stderr
    return folder


def test_a_phase_put_in_front_does_not_take_up_the_checkpoint_of_another(killed: Path) -> None:
    first = "        - {phase: 2, num_steps: 2, learning_rate: 1e-3}\n"
    (killed / "two.yaml").write_text(RECIPE.replace(first, 2 * first), encoding="utf-8")
    before = contents(killed)
    result = invoke(DISTILL, cwd=killed)
    assert result.exit_code == 2
    assert "flash.phase1.ckpt belongs to another run (another recipe, decoder or data)" in result.stderr
    assert "resume to never" in result.stderr
    assert contents(killed) == before  # the log too


def test_starting_anew_says_what_it_gives_up_and_keeps_it_until_its_first_checkpoint(
    killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(killed)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "draw", dying_in(1, 0, TrainingData.draw))
        result = invoke(f"{DISTILL} --resume never", cwd=killed)
    assert (
        "Warning: --resume never: starting over. The first checkpoint of this run replaces "
        "flash.phase1.ckpt (phase 2, 2 of 2 steps), flash.phase2.ckpt (phase 3, 2 of 3 steps)"
    ) in result.stderr
    assert contents(killed) == before
    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "draw", dying_in(1, 1, TrainingData.draw))
        invoke(f"{DISTILL} --resume never", cwd=killed)
    assert {path.name for path in killed.glob("*.ckpt")} == {"flash.phase1.ckpt"}
    assert checkpoint_state(killed / "flash.phase1.ckpt").step == 1
    with monkeypatch.context() as patch:  # the first phase's checkpoint is this run's when the second one saves
        patch.setattr(TrainingData, "draw", dying_in(2, 1, TrainingData.draw))
        result = invoke(f"{DISTILL} --resume never", cwd=killed)
    assert "replaces flash.phase1.ckpt (phase 2, 1 of 2 steps);" in result.stderr
    assert {path.name for path in killed.glob("*.ckpt")} == {"flash.phase1.ckpt", "flash.phase2.ckpt"}
    resumed = succeed(DISTILL, cwd=killed)
    assert [phase["resumed_from"] for phase in resumed["phases"]] == [2, 1]


def test_a_log_that_lacks_what_the_checkpoints_know_is_made_whole(killed: Path) -> None:
    (killed / "flash.log.jsonl").unlink()
    succeed(DISTILL, cwd=killed)
    assert [(entry["index"], entry["step"]) for entry in log_of(killed)] == [(1, 2), (2, 3)]


def test_a_second_run_on_the_same_output_is_refused(folder: Path) -> None:
    with TrainingFiles(folder / "flash.safetensors").alone():
        before = contents(folder)
        result = invoke(DISTILL, cwd=folder)
        assert result.exit_code == 2
        assert "another run is training flash.safetensors (process " in result.stderr
        assert contents(folder) == before
        succeed(f"{DISTILL} --phase 3 --num-steps 1 --output other.safetensors", cwd=folder)
    succeed(f"{DISTILL} --phase 3 --num-steps 1", cwd=folder)
    assert not list(folder.glob(".*"))


def test_sigterm_between_two_phases_says_what_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = TrainingData.draw

    def terminated(data: TrainingData, *, seed: int, **settings: int) -> Callable:
        if seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(data, seed=seed, **settings)

    monkeypatch.setattr(TrainingData, "draw", terminated)
    result = invoke(f"{DISTILL} --quiet --cache-latents cache", cwd=folder)
    assert result.exit_code == 143
    assert result.stderr == (
        "Error: terminated: nothing was written to flash.safetensors; run again to resume from flash.phase1.ckpt "
        "(phase 2, 2 of 2 steps); the encoded clips are kept in cache\n"
    )
    assert not list(folder.glob(".*"))  # the lock is gone


def test_a_strip_is_drawn_when_it_is_time(folder: Path) -> None:
    succeed(f"{DISTILL} --phase 3 --num-steps 2 --sample-every-minutes 1e-6", cwd=folder)
    strips = sorted((folder / "flash.samples").iterdir())
    assert [strip.name for strip in strips] == ["phase3-step000001.png", "phase3-step000002.png"]
    with Image.open(strips[0]) as picture:
        assert min(picture.size) > 50


def test_tensorboard_is_asked_for_and_missed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    result = invoke(f"{DISTILL} --tensorboard runs", cwd=folder)
    assert result.exit_code == 2 and "pip install tensorboard" in result.stderr


def test_a_loss_without_its_weights_is_one_short_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(folder / "nothing"))
    done = succeed(DISTILL.removesuffix(" --loss-weight lpips=0"), cwd=folder)
    lines = [line for line in done["stderr"].splitlines() if "lpips" in line.lower()]
    assert lines == [
        "Warning: no LPIPS in the loss: its backbone's weights are not here (--allow-download gets them, 528 MB)"
    ]
    assert [phase["absent_terms"] for phase in done["phases"]] == [["lpips"], ["lpips"]]
