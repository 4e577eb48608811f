"""The program itself, killed twenty times or spread over two processes: what the unit tests do with its loop."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flashvaed_cli.artifact.store import read_artifact
from tests.commands import CALIBRATION, succeed
from tests.toy import write_toy_clip, write_toy_vae

NUM_KILLS = 20
TRAINING = "--phase 3 --num-clips 2 --num-frames 5 --crop-size 32 --loss-weight lpips=0 --data clip.mp4 --device cpu"
DISTILL = f"distill converted.safetensors {TRAINING} --num-steps 150 --batch-size 1 --checkpoint-every-steps 1"
TOGETHER = f"distill converted.safetensors {TRAINING} --num-steps 3"
LIMIT_S = 300.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    succeed(f"convert-ops vae.safetensors --data clip.mp4 {CALIBRATION}", cwd=tmp_path)
    return tmp_path


def start(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    package = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.bench
def test_twenty_kills_of_the_program(folder: Path) -> None:
    """At random moments of its training; each life begins where the one before it was."""
    moments = random.Random(0)
    for _ in range(NUM_KILLS):
        process = start(["flashvaed_cli", *DISTILL.split()], folder)
        assert process.stderr is not None
        while b"distill phase 3: 150 to do" not in (line := process.stderr.readline()):
            assert line, "it ended without training"
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate(timeout=LIMIT_S)
    survivor = succeed(DISTILL.removesuffix(" --device cpu"), cwd=folder)
    assert survivor["phases"][0]["resumed_from"] > 0
    _, weights = read_artifact(folder / "flash.safetensors")
    (folder / "flash.safetensors").unlink()
    assert succeed(DISTILL, cwd=folder)["phases"][0]["resumed_from"] is None
    _, expected = read_artifact(folder / "flash.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.bench
def test_two_processes_of_torchrun(folder: Path) -> None:
    """As `accelerate launch` starts them: one output, one voice, and the weights of the double batch."""
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "-m", "flashvaed_cli"]
    process = start([*launch, *TOGETHER.split(), "--batch-size", "1", "--output", "two.safetensors"], folder)
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    assert said.count(b"distill phase 3: 3 to do") == 1
    succeed(f"{TOGETHER} --batch-size 2 --output one.safetensors", cwd=folder)
    (header, two), (_, one), (_, start_weights) = (
        read_artifact(folder / f"{name}.safetensors") for name in ("two", "one", "converted")
    )
    assert header.measured["num_processes"] == 2
    apart = sum(float((two[name] - one[name]).square().sum()) for name in one)
    moved = sum(float((one[name] - start_weights[name]).square().sum()) for name in one)
    assert (apart / moved) ** 0.5 < 0.02  # rounding, which AdamW amplifies
