from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.stages.distill.watch import SampleStrips, TrainingLog, TrainingWatch
from tests.toy import toy_decoder, toy_latents


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def test_steps_that_a_resumed_run_repeats_are_not_logged_twice(tmp_path: Path) -> None:
    path = tmp_path / "flash.log.jsonl"
    log = TrainingLog(path, "a", resumes=False)
    for step in (5, 10):
        log.append(1, 1, {"step": step, "loss": 1.0})
    log.append(2, 3, {"step": 5, "loss": 0.5})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"index": 2, "phase": 3, "st')  # torn off by a kill

    again = TrainingLog(path, "a", resumes=True)
    for step in (5, 10):
        again.append(2, 3, {"step": step, "loss": 0.5})
    assert [(entry["index"], entry["step"]) for entry in entries(path)] == [(1, 5), (1, 10), (2, 5), (2, 10)]


def test_another_run_and_a_run_from_the_start_have_logs_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "flash.log.jsonl"
    for run_key, resumes in (("a", False), ("b", True), ("b", False)):
        TrainingLog(path, run_key, resumes=resumes).append(1, 1, {"step": 5, "loss": 1.0})
        assert len(entries(path)) == 1
        assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == {"run_key": run_key}


def test_a_full_disk_ends_the_log_and_not_the_training(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "flash.log.jsonl"
    progress = SilentProgress()
    watch = TrainingWatch(progress, TrainingLog(path, "a", resumes=False), None, None)
    path.mkdir(parents=True)  # an OSError, as a full disk is
    after_step = watch.for_phase(1, 3, 0)
    for step in (5, 10):
        after_step(step, {"step": step, "loss": 1.0})
    assert len(progress.warnings) == 1 and "log: not written" in progress.warnings[0]


def test_a_strip_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    student, teacher = toy_decoder(seed=1).requires_grad_(True), toy_decoder()
    before: dict[str, Tensor] = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    strips = SampleStrips(tmp_path, toy_latents(2), student, teacher, every_s=0)
    strips.draw_if_due(3, 7)
    assert (tmp_path / "phase3-step000007.png").stat().st_size > 1000
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
