from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill import checkpoint as checkpoint_module
from flashvaed_cli.distill.checkpoint import CheckpointState, checkpoint_state
from flashvaed_cli.distill.interrupts import stop_wish
from flashvaed_cli.distill.loop import TrainResult, train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.phases import PhasePlan, plan_phase_3
from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.errors import DistillationError, Interrupted
from tests.unit.distill.small_decoders import batches, pruned_spec, teacher_decoder

TEACHER = teacher_decoder()
SETTINGS = TrainSettings(
    num_steps=7,
    learning_rate=1e-3,
    num_warmup_steps=2,
    schedule="cosine",
    ema_decay=0.9,
    loss_weights=LossWeights(lpips=0.0),
    log_every_steps=3,
    checkpoint_every_steps=2,
)


def pruned_student() -> Decoder:
    torch.manual_seed(3)
    return Decoder(pruned_spec(TEACHER.spec, 1))


def phase_3(student: Decoder) -> PhasePlan:
    maps = {f"up3.{i}": (torch.ones(2, 1), torch.zeros(2)) for i in range(2)}
    return plan_phase_3(student.spec, TEACHER.spec, projections=maps)


def run(
    path: Path | None, *, resume: bool = True, source=batches, replaces=(), after_step=None, **changes
) -> tuple[Decoder, TrainResult]:
    student = pruned_student()
    result = train(
        student,
        TEACHER,
        phase_3(student),
        source,
        replace(SETTINGS, **changes),
        checkpoint_path=path,
        resume=resume,
        replaces=replaces,
        after_step=after_step,
    )
    return student, result


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved on the way out."""


def dying_at(step: int):
    def source(number: int) -> tuple[Tensor, ...]:
        if number == step:
            raise Killed
        return batches(number)

    return source


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


@pytest.mark.parametrize("killed_at", [1, 3, 6])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path: Path, killed_at: int) -> None:
    whole, expected = run(None)
    path = tmp_path / "phase3.ckpt"
    with pytest.raises(Killed):
        run(path, source=dying_at(killed_at))
    resumed, result = run(path)
    assert result.resumed_from == (killed_at // 2 * 2 or None)
    assert result.num_steps == 7
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert without_time(result.history) == without_time(expected.history)
    assert [entry["step"] for entry in result.history] == [3, 6, 7]


def test_a_finished_phase_resumes_without_a_step(tmp_path: Path) -> None:
    path = tmp_path / "phase3.ckpt"
    first, _ = run(path)
    again, result = run(path, source=dying_at(0))
    assert result.resumed_from == 7 and len(result.history) == 3
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_without_resume_the_checkpoint_is_not_read_and_stays_until_the_first_new_one(tmp_path: Path) -> None:
    path, later = tmp_path / "flash.phase1.ckpt", tmp_path / "flash.phase2.ckpt"
    run(path, num_steps=1)
    later.write_bytes(b"of the run that is given up")
    before = path.read_bytes()
    with pytest.raises(Killed):
        run(path, resume=False, source=dying_at(1), replaces=[later])
    assert path.read_bytes() == before and later.exists()
    with pytest.raises(Killed):
        run(path, resume=False, source=dying_at(2), replaces=[later])
    assert checkpoint_state(path) == CheckpointState(phase=3, step=2, num_steps=7)
    assert not later.exists()


def test_what_is_past_is_told_again(tmp_path: Path) -> None:
    path, told = tmp_path / "phase3.ckpt", []
    with pytest.raises(Killed):
        run(path, source=dying_at(6), log_every_steps=2)
    run(path, log_every_steps=2, after_step=lambda step, entry: entry and told.append((step, entry["step"])))
    assert told == [(None, 2), (None, 4), (None, 6), (7, 7)]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_stop_and_the_run_goes_on_from_there(
    tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    def interrupted(step: int) -> tuple[Tensor, ...]:
        if step == 3:
            os.kill(os.getpid(), number)
        return batches(step)

    whole, _ = run(None)
    path = tmp_path / "phase3.ckpt"
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} after step 4 of 7") as caught:
        run(path, source=interrupted, checkpoint_every_steps=None)
    assert caught.value.exit_code == exit_code and signal.getsignal(number) is before
    resumed, result = run(path)
    assert result.resumed_from == 4
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.fixture
def usual_interrupt() -> Iterator[None]:
    """SIGINT as in a foreground process: a shell starts background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_acts_at_once_and_other_threads_see_none(usual_interrupt: None) -> None:
    with stop_wish() as wish:
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    wishes = []

    def elsewhere() -> None:
        with stop_wish() as wish:
            wishes.append(wish.signal_number)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert wishes == [None]


def poisoned_from(step: int):
    def source(number: int) -> tuple[Tensor, ...]:
        (latents,) = batches(number)
        return (latents * (float("nan") if number >= step else 1.0),)

    return source


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "phase3.ckpt"
    with pytest.raises(DistillationError, match=r"step 6 of 7: the loss is nan.*phase3.ckpt \(step 4\)"):
        run(path, source=poisoned_from(5))
    content = torch.load(path, weights_only=True)
    assert content["counters"]["step"] == 4
    assert all(torch.isfinite(value).all() for value in content["student"].values())
    with pytest.raises(DistillationError, match="nothing was saved yet"):
        run(None, source=poisoned_from(0))


def test_an_exploding_loss_stops() -> None:
    with pytest.raises(DistillationError, match="times the first"):
        run(None, learning_rate=100.0, gradient_clip_norm=None, num_warmup_steps=0, explosion_factor=2.0)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "phase3.ckpt"
    run(path, num_steps=1)
    with pytest.raises(DistillationError, match=r"num_steps 1 instead of 7.*learning_rate 0.001 instead of 0.01"):
        run(path, learning_rate=1e-2)
    student = pruned_student()
    with pytest.raises(DistillationError, match="another recipe, decoder or data"):
        train(
            student,
            TEACHER,
            phase_3(student),
            batches,
            replace(SETTINGS, num_steps=1),
            checkpoint_path=path,
            resume=True,
            run_key="b",
        )
    converted = Decoder(TEACHER.spec)
    plan = replace(plan_phase_3(converted.spec, TEACHER.spec), number=1)
    with pytest.raises(DistillationError, match="phase 3 instead of 1"):
        train(converted, TEACHER, plan, batches, replace(SETTINGS, num_steps=1), checkpoint_path=path, resume=True)
    plan = plan_phase_3(converted.spec, TEACHER.spec)
    with pytest.raises(DistillationError, match="does not fit the decoder"):
        train(converted, TEACHER, plan, batches, replace(SETTINGS, num_steps=1), checkpoint_path=path, resume=True)


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "phase3.ckpt"
    run(path, num_steps=1)
    if damage == "other":
        torch.save([1, 2], path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 1000])
    with pytest.raises(DistillationError, match=r"phase3.ckpt .*Delete it"):
        run(path, num_steps=1)


def test_checkpoints_of_another_shape_are_named(tmp_path: Path) -> None:
    path = tmp_path / "phase3.ckpt"
    run(path, num_steps=1)
    whole = torch.load(path, weights_only=True)
    odd: tuple = (3, {"step": "x"})
    for part in ("settings", "counters", "terms", "student", "optimizer", "average", "rng"):
        for value in odd:
            torch.save({**whole, part: value}, path)
            with pytest.raises(DistillationError, match=r"phase3.ckpt .*[Dd]elete it"):
                run(path, num_steps=1)


def test_a_full_disk_is_reported_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "phase3.ckpt"
    save = torch.save

    def full(content: dict, target: BinaryIO) -> None:
        if content["counters"]["step"] > 2:
            target.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, target)

    monkeypatch.setattr(checkpoint_module.torch, "save", full)
    with pytest.raises(DistillationError, match=r"step 4 cannot be written .*No space left.*that of step 2 is intact"):
        run(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["phase3.ckpt"]
    assert torch.load(path, weights_only=True)["counters"]["step"] == 2


def test_seconds_between_checkpoints_count_too(tmp_path: Path) -> None:
    path = tmp_path / "phase3.ckpt"
    with pytest.raises(Killed):
        run(path, source=dying_at(3), checkpoint_every_steps=None, checkpoint_every_s=0.0)
    assert torch.load(path, weights_only=True)["counters"]["step"] == 3
