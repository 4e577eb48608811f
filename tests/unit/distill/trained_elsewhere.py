"""A short training for processes of their own: to be killed, or to train together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill.checkpoint import HistoryEntry
from flashvaed_cli.distill.loop import TrainResult, train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.phases import PhasePlan, plan_phase_2, plan_phase_3
from flashvaed_cli.distill.ranks import ALONE, Ranks, joined_ranks
from flashvaed_cli.distill.settings import TrainSettings
from tests.unit.distill.small_decoders import pruned_spec, teacher_decoder

Batches = Callable[[int], tuple[Tensor, ...]]
NUM_CLIPS = 4
BASE_WIDTH, KEPT_WIDTH = 8, 4  # a norm over one or two channels makes a jump of a rounding difference


def clips_of(step: int) -> Tensor:
    """All clips of a step, however they are spread over micro-batches and ranks."""
    return torch.randn(NUM_CLIPS, 16, 2, 3, 3, generator=torch.Generator().manual_seed(step))


def pruned_student() -> Decoder:
    """Narrower than its teacher, with random weights."""
    torch.manual_seed(3)
    return Decoder(pruned_spec(teacher_decoder(BASE_WIDTH).spec, KEPT_WIDTH))


def phase_3(student: Decoder) -> PhasePlan:
    """With projections that train too."""
    maps = {f"up3.{i}": (torch.ones(BASE_WIDTH, KEPT_WIDTH), torch.zeros(BASE_WIDTH)) for i in range(2)}
    return plan_phase_3(student.spec, teacher_decoder(BASE_WIDTH).spec, projections=maps)


def phase_2(student: Decoder) -> PhasePlan:
    """L_ce on a stream and on the inside of a block."""
    return plan_phase_2(student.spec, student.spec, to_keep={"up2.0": (1, 2), "up2.0.conv1": (0, 3)})


def settings(num_steps: int) -> TrainSettings:
    """Everything that has a state: schedule, moving average, checkpoints."""
    return TrainSettings(
        num_steps=num_steps,
        learning_rate=1e-3,
        max_relative_step=0.01,
        num_warmup_steps=2,
        schedule="cosine",
        ema_decay=0.9,
        loss_weights=LossWeights(lpips=0.0),
        log_every_steps=3,
        checkpoint_every_steps=1,
    )


def train_to_the_end(
    path: Path | None, num_steps: int, started: Connection | None = None
) -> tuple[Decoder, TrainResult]:
    """Train the pruned student, going on from `path`; every step is announced before it begins."""
    torch.set_num_threads(1)

    def batches(step: int) -> tuple[Tensor, ...]:
        if started is not None:
            started.send(step)
        return (clips_of(step)[:1],)

    student = pruned_student()
    result = train(
        student,
        teacher_decoder(BASE_WIDTH),
        phase_3(student),
        batches,
        settings(num_steps),
        checkpoint_path=path,
        resume=True,
    )
    return student, result


def one_of_two_ranks(rank: int, port: int, phase: int, num_steps: int, path: Path) -> None:
    """A process of a launch of two, as a launcher starts it; saves what came of it."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    with joined_ranks(torch.device("cpu")) as (ranks, _):
        half = NUM_CLIPS // 2
        mine = slice(half * ranks.rank, half * (ranks.rank + 1))
        training = trained(phase, num_steps, lambda step: (clips_of(step)[mine],), ranks)
    torch.save(asdict(training), path)


@dataclass(frozen=True)
class Trained:
    """Where a training led, and how."""

    weights: dict[str, Tensor]
    history: list[HistoryEntry]
    is_pruned: bool


def trained(phase: int, num_steps: int, batches: Batches, ranks: Ranks = ALONE) -> Trained:
    """Train the student of a phase for so many steps."""
    student = pruned_student() if phase == 3 else teacher_decoder(BASE_WIDTH)
    plan = phase_3(student) if phase == 3 else phase_2(student)
    every_step = replace(settings(num_steps), log_every_steps=1)
    result = train(student, teacher_decoder(BASE_WIDTH), plan, batches, every_step, ranks=ranks)
    return Trained(student.state_dict(), result.history, phase == 3)
