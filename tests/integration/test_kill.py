"""SIGKILL at any moment: an output is not there, or whole. And a killed distillation goes on where it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashvaed_cli.artifact.store import read_artifact
from tests.commands import CALIBRATION, TRAINING, strict_json, succeed
from tests.toy import write_toy_clip, write_toy_vae

LIMIT_S = 120.0
POLL_S = 0.001
LATENCY = "--latency-frames 1 --latency-side 16 --num-latency-rounds 1 --width-latency-s 0"
COMMANDS = {
    "analysis.safetensors": f"analyze vae.safetensors --data clip.mp4 {CALIBRATION} {LATENCY}",
    "pruned.safetensors": f"prune vae.safetensors --ratio 0.5 --data clip.mp4 {CALIBRATION}",
    "flash.safetensors": f"distill vae.safetensors --phase 3 --num-steps 3 --data clip.mp4 {TRAINING}",
}
DISTILL = f"distill vae.safetensors --phase 3 --num-steps 24 --checkpoint-every-steps 1 --data clip.mp4 {TRAINING}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    return tmp_path


def start(words: str, folder: Path) -> subprocess.Popen[bytes]:
    """Run the program as a process of its own."""
    package = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "flashvaed_cli", *words.split(), "--device", "cpu"]
    return subprocess.Popen(arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(event: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Whether the event came before the process ended."""
    limit_s = time.monotonic() + LIMIT_S
    while not event():
        if process.poll() is not None:
            return event()
        assert time.monotonic() < limit_s, "neither the event nor the end came"
        time.sleep(POLL_S)
    return True


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)


def hidden_siblings(folder: Path) -> list[Path]:
    """Files that grow beside their target."""
    return list(folder.glob(".*.safetensors")) + list(folder.glob(".*.ckpt"))


@pytest.mark.parametrize("output", COMMANDS)
def test_killed_while_it_writes(folder: Path, output: str) -> None:
    process = start(COMMANDS[output], folder)
    wait_for(lambda: bool(hidden_siblings(folder)), process)
    kill(process)
    if (folder / output).exists():
        read_artifact(folder / output)
    # What the kill left behind is in nobody's way: the same command runs through.
    succeed(COMMANDS[output], cwd=folder)
    read_artifact(folder / output)


def test_killed_at_random_over_an_older_result(folder: Path) -> None:
    succeed(COMMANDS["pruned.safetensors"], cwd=folder)
    before = (folder / "pruned.safetensors").read_bytes()
    process = start(COMMANDS["pruned.safetensors"] + " --seed 1 --force", folder)
    assert process.stderr is not None
    process.stderr.readline()  # it has started to work
    time.sleep(random.Random(0).uniform(0, 0.5))
    kill(process)
    header, _ = read_artifact(folder / "pruned.safetensors")
    assert header.seed == 1 or (folder / "pruned.safetensors").read_bytes() == before


def test_sigterm_outside_of_training_says_that_nothing_was_written(folder: Path) -> None:
    process = start(COMMANDS["pruned.safetensors"] + " --json", folder)
    assert process.stderr is not None
    assert process.stderr.readline()  # it has started to work
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143, errors
    assert strict_json(printed.decode())["exit_code"] == 143
    assert errors.endswith(b"Error: terminated: nothing was written to pruned.safetensors\n")
    assert {path.name for path in folder.iterdir()} == {"vae.safetensors", "clip.mp4"}


def test_a_killed_distillation_goes_on_to_the_same_weights(folder: Path) -> None:
    output, checkpoint = folder / "flash.safetensors", folder / "flash.phase1.ckpt"
    process = start(DISTILL, folder)
    assert wait_for(checkpoint.exists, process), process.communicate()
    time.sleep(0.1)
    kill(process)
    assert checkpoint.exists() and not output.exists()

    resumed = succeed(DISTILL, cwd=folder)
    assert not checkpoint.exists()
    (phase,) = resumed["phases"]
    # Killed after its first checkpoint, before its end.
    assert phase["num_steps"] == 24 and 1 <= phase["resumed_from"] < 24
    _, weights = read_artifact(output)

    output.unlink()
    uninterrupted = succeed(f"{DISTILL} --checkpoint-every-steps 1000", cwd=folder)  # the last of two flags counts
    assert uninterrupted["phases"][0]["resumed_from"] is None
    _, expected = read_artifact(output)
    assert weights.keys() == expected.keys()
    # One thread on the CPU: bit for bit.
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_sigterm_saves_and_says_how_to_go_on(folder: Path) -> None:
    process = start(DISTILL.replace("--checkpoint-every-steps 1", "--checkpoint-every-steps 1000") + " --json", folder)
    assert process.stderr is not None
    while b"distill phase 3: 24 to do" not in (line := process.stderr.readline()):
        assert line, "it ended without training"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143, errors
    assert "run again to resume" in strict_json(printed.decode())["message"]
    assert b"run again to resume" in errors
    assert (folder / "flash.phase1.ckpt").exists() and not (folder / "flash.safetensors").exists()
    # Cadence may change between a run and its resumption.
    assert succeed(DISTILL, cwd=folder)["phases"][0]["resumed_from"] >= 1
