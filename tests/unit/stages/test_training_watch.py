from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.distill.checkpoint import HistoryEntry
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.stages.distill.watch import SampleStrips, TensorBoardLog, TrainingLog, TrainingWatch
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


def test_tensorboard_gets_what_a_resumed_run_adds(tmp_path: Path) -> None:
    """A finished phase is told again, which must purge nothing that a later one has written."""
    written: list[tuple[int, int]] = []

    class Board(TensorBoardLog):
        def __init__(self) -> None:
            pass

        def append(self, done_before: int, phase: int, entry: HistoryEntry) -> None:
            written.append((phase, done_before + int(entry["step"])))

    watch = TrainingWatch(SilentProgress(), TrainingLog(tmp_path / "log", "a", resumes=False), Board(), None)
    first, second = watch.for_phase(1, 1, 0), watch.for_phase(2, 3, 10)
    for entry in ({"step": 5, "loss": 1.0}, {"step": 10, "loss": 1.0}):
        first(None, entry)
    second(None, {"step": 5, "loss": 1.0})
    second(10, {"step": 10, "loss": 1.0})
    assert written == [(3, 20)]
    assert [entry["step"] for entry in entries(tmp_path / "log")] == [5, 10, 5, 10]


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
