"""One training loop for every phase; read `train` from top to bottom."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill.adversary import Adversary
from flashvaed_cli.distill.averaging import WeightAverage
from flashvaed_cli.distill.checkpoint import HistoryEntry, TrainState, load_train_state, save_train_state
from flashvaed_cli.distill.features import FeatureMatcher
from flashvaed_cli.distill.guards import require_sane_step
from flashvaed_cli.distill.interrupts import stop_wish
from flashvaed_cli.distill.losses import psnr_of_error_db
from flashvaed_cli.distill.objective import Objective, Perceptual, prepare_objective
from flashvaed_cli.distill.parameter_groups import build_optimizer
from flashvaed_cli.distill.phases import PhasePlan, gradient_masks, trained_parameters
from flashvaed_cli.distill.ranks import ALONE, Ranks
from flashvaed_cli.distill.settings import TrainSettings, learning_rate_at
from flashvaed_cli.errors import DistillationError, Interrupted
from flashvaed_cli.progress import Progress, SilentProgress

Batches = Callable[[int], Sequence[Tensor]]
"""Step number to this rank's micro-batches of raw latents `[B, C, T, Hz, Wz]`: always the same for the same number."""

Validate = Callable[[], Mapping[str, float]]
"""Figures of the student on held-out clips, for the history."""

AfterStep = Callable[[int | None, HistoryEntry | None], None]
"""Called on the main rank with the number of steps done and the history entry just completed, if any.

At the start it is called with every existing entry, so that a log with gaps is completed; with None for the number if
an earlier process made them.
"""


@dataclass(frozen=True)
class TrainResult:
    """The result of a phase; the weights are in the student.

    Attributes:
        history: means of the loss terms (unweighted), `loss` (weighted sum), `psnr_db` to the teacher's frames,
            `gradient_norm`, `learning_rate`, `step` and `seconds` at the end of the entry, and what `validate` gave.
        num_steps: steps done, those before a resumption included.
        seconds, data_seconds: spent on steps, and, of these, on waiting for batches.
        clips_per_s: throughput over `seconds`.
        resumed_from: the step of the checkpoint that the run resumed from.
        absent_terms: terms with a weight that could not be computed (`lpips` without a network for it,
            `feature` without any tensor to match).
        unmatched: tensors that the feature loss had to leave out.
    """

    history: list[HistoryEntry]
    num_steps: int
    seconds: float
    data_seconds: float
    clips_per_s: float
    resumed_from: int | None
    absent_terms: tuple[str, ...]
    unmatched: tuple[str, ...]


def train(
    student: Decoder,
    teacher: Decoder,
    plan: PhasePlan,
    batches: Batches,
    settings: TrainSettings,
    *,
    checkpoint_path: Path | None = None,
    resume: bool = False,
    replaces: Sequence[Path] = (),
    run_key: str = "",
    perceptual: Perceptual | None = None,
    told_absent: Sequence[str] = (),
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    validate: Validate | None = None,
    after_step: AfterStep | None = None,
) -> TrainResult:
    """Train the student in place to reproduce the teacher's frames and features.

    On the CPU a run that was stopped and resumed ends with the same weights, bit for bit, as an uninterrupted one.
    Micro-batches and ranks share a step: their gradients are averaged, as if their clips were one batch.

    Args:
        batches: the micro-batches of a step, on any device.
        checkpoint_path: where to save; the file of a finished phase stays (resuming it runs no steps)
            and is the caller's to delete. All ranks read it, the main one writes it.
        resume: continue from `checkpoint_path` if it exists.
        replaces: discarded files of an earlier run: the main rank removes them once the first checkpoint of
            this one is on disk.
        run_key: identifies the run in the checkpoint; see `TrainState`.
        perceptual: the LPIPS term; without it the term is absent, and the result says so.
        told_absent: absent terms that the user already knows about.
        ranks: the processes that train together.
        validate: called on the main rank, with the weights that the student would end with, before the first
            step, every `validate_every_steps` and after the last. Its time is not counted.
    Raises:
        DistillationError: half-precision weights, latents that do not fit, a checkpoint of another run, a
            NaN or exploding loss, a checkpoint that cannot be written.
        Interrupted: SIGINT or SIGTERM on any rank, after saving.
    """
    progress = progress or SilentProgress()
    state = _start(student, plan, settings, run_key, ranks)
    objective = prepare_objective(
        student, teacher, plan, state.matcher, settings, perceptual=perceptual, ranks=ranks, adversary=state.adversary
    )
    masks = gradient_masks(student, plan)
    _report_gaps(progress, objective, told_absent)
    resumed_from = _resume(state, checkpoint_path, ranks, progress) if resume else None
    ranks.share(state.trained)
    if state.adversary is not None:
        ranks.share(state.adversary.network.parameters())
    if validate is not None and ranks.is_main and state.step == 0:
        state.history.append({"step": 0, **validate(), "seconds": 0.0})
    if after_step is not None and ranks.is_main:
        for entry in state.history:
            after_step(None if state.step else 0, entry)
    saved_at = time.monotonic()
    title = f"distill phase {plan.number}"
    with (
        _training_only(student, state.parameters),
        stop_wish() as wish,
        progress.task(title, settings.num_steps) as task,
    ):
        task.advance(state.step)
        while state.step < settings.num_steps:
            began = time.perf_counter()
            micro_batches = [_checked(latents, student).to(state.device) for latents in batches(state.step)]
            state.data_seconds += time.perf_counter() - began

            state.optimizer.zero_grad(set_to_none=True)
            values = _accumulate_gradients(objective, micro_batches, state.step)
            ranks.average_gradients(state.trained)
            values = _mean_over_ranks(values, ranks)
            for name, mask in masks.items():
                if (gradient := state.parameters[name].grad) is not None:
                    gradient.mul_(mask)
            gradient_norm = nn.utils.clip_grad_norm_(state.trained, settings.gradient_clip_norm or math.inf)
            require_sane_step(values, float(gradient_norm), state, checkpoint_path)

            learning_rate = learning_rate_at(state.step, settings)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate * group["rate_scale"]
            state.optimizer.step()
            if state.average is not None:
                state.average.update(state.parameters)
            if state.adversary is not None and state.adversary.has_begun(state.step):
                state.adversary.step(ranks)

            state.step += 1
            state.num_clips += ranks.count * sum(len(latents) for latents in micro_batches)
            state.seconds += time.perf_counter() - began
            state.terms.add({**values, "gradient_norm": gradient_norm})
            figures = _validated(state, validate) if ranks.is_main else {}
            entry = _close_entry(state, learning_rate, figures)
            task.advance(1, **_shown(state, entry))

            stop_signal, is_late = _agree(ranks, state, wish.signal_number, saved_at)
            if checkpoint_path is not None and _checkpoint_is_due(state, stop_signal, is_late=is_late):
                _save(state, checkpoint_path, ranks, replaces)
                saved_at = time.monotonic()
            if after_step is not None and ranks.is_main:
                after_step(state.step, entry)
            if stop_signal is not None:
                raise _interrupted(state, stop_signal, checkpoint_path, ranks)
    if state.average is not None:
        state.average.copy_to(state.parameters)
    return TrainResult(
        history=state.history,
        num_steps=state.step,
        seconds=state.seconds,
        data_seconds=state.data_seconds,
        clips_per_s=state.num_clips / max(state.seconds, 1e-9),
        resumed_from=resumed_from,
        absent_terms=objective.absent,
        unmatched=plan.unmatched,
    )


def _accumulate_gradients(objective: Objective, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
    """Leave the gradient of the mean loss in the parameters; returns the means of the logged values."""
    sums: dict[str, Tensor] = {}
    for latents in micro_batches:
        loss, values = objective(latents, step=step, share=1 / len(micro_batches))
        (loss / len(micro_batches)).backward()
        for name, value in values.items():
            value = value.detach() / len(micro_batches)
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _mean_over_ranks(values: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    means = ranks.mean(torch.stack(list(values.values())))
    return dict(zip(values, means.unbind(), strict=True))


def _agree(ranks: Ranks, state: TrainState, signal_number: int | None, saved_at: float) -> tuple[int | None, bool]:
    """What all ranks do together: stop if any of them got a signal, save when the main one's clock says so."""
    every_s = state.settings.checkpoint_every_s
    is_late = every_s is not None and ranks.is_main and time.monotonic() - saved_at >= every_s
    if ranks.count == 1:
        return signal_number, is_late
    wishes = torch.zeros(signal.NSIG + 1, device=state.device)
    wishes[signal_number or 0] = 1.0
    wishes[signal.NSIG] = float(is_late)
    agreed = ranks.sum(wishes).tolist()
    return next((number for number in range(1, signal.NSIG) if agreed[number]), None), bool(agreed[signal.NSIG])


def _save(state: TrainState, path: Path, ranks: Ranks, replaces: Sequence[Path]) -> None:
    ranks.from_main(lambda: save_train_state(state, path))
    state.saved_step = state.step
    if ranks.is_main:
        for old in replaces:
            old.unlink(missing_ok=True)


def _start(student: Decoder, plan: PhasePlan, settings: TrainSettings, run_key: str, ranks: Ranks) -> TrainState:
    parameters = trained_parameters(student, plan)
    if any(parameter.dtype != torch.float32 for parameter in student.parameters()):
        raise DistillationError(
            "Weights must be float32 to train: small steps are lost in half precision. "
            "Set the dtype to float32, and the compute dtype to bfloat16 for speed."
        )
    matcher = FeatureMatcher(plan.matches).to(next(student.parameters()).device)
    held = gradient_masks(student, plan)
    optimizer = build_optimizer(parameters, matcher.parameters(), held=held, settings=settings)
    average = None if settings.ema_decay is None else WeightAverage(parameters, settings.ema_decay)
    adversary = None
    if settings.loss_weights.adversarial > 0:
        device, rate = next(student.parameters()).device, settings.discriminator_learning_rate
        adversary = Adversary(device, start=settings.adversarial_start, learning_rate=rate)
    return TrainState(
        student=student,
        matcher=matcher,
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        adversary=adversary,
        phase=plan.number,
        settings=settings,
        run_key=run_key,
        num_ranks=ranks.count,
    )


def _resume(state: TrainState, path: Path | None, ranks: Ranks, progress: Progress) -> int | None:
    if path is None or not ranks.from_main(path.exists):
        return None
    num_ranks_before = load_train_state(state, path)
    progress.log(f"going on from step {state.step} of {state.settings.num_steps} ({path})")
    if num_ranks_before != ranks.count:
        progress.warn(
            f"{path} was trained by {num_ranks_before} processes and continues with {ranks.count}: from here on, steps "
            "see different clips than they would have"
        )
    return state.step


def _report_gaps(progress: Progress, objective: Objective, told: Sequence[str]) -> None:
    plan = objective.plan
    if untold := [name for name in objective.absent if name not in told]:
        progress.warn(f"distill phase {plan.number} runs without the loss terms {', '.join(untold)}")
    if plan.unmatched:
        progress.warn(
            f"distill phase {plan.number} cannot match the features of {', '.join(plan.unmatched)}: they are "
            "narrower than the original's, and the kept channels are not recorded"
        )


@contextmanager
def _training_only(student: Decoder, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to these parameters only; afterwards everything is as before."""
    before = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in parameters)
    try:
        yield
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


def _checked(latents: Tensor, student: Decoder) -> Float[Tensor, "B C T Hz Wz"]:
    if latents.ndim != 5 or latents.shape[1] != student.spec.latent_width:
        raise DistillationError(
            f"The decoder takes latents [B, {student.spec.latent_width}, T, H, W], a batch has {list(latents.shape)}."
        )
    return latents.float()


def _validated(state: TrainState, validate: Validate | None) -> Mapping[str, float]:
    """The student's figures, with its average weights if it has them, when they are due."""
    every = state.settings.validate_every_steps
    is_due = state.step == state.settings.num_steps or (every is not None and state.step % every == 0)
    if validate is None or not is_due:
        return {}
    with nullcontext() if state.average is None else state.average.in_place_of(state.parameters):
        return validate()


def _close_entry(state: TrainState, learning_rate: float, figures: Mapping[str, float]) -> HistoryEntry | None:
    """Close a history entry if one is due, or if there are figures to record."""
    is_due = state.step % state.settings.log_every_steps == 0 or state.step == state.settings.num_steps
    if not is_due and not figures:
        return None
    means = state.terms.take()
    means["psnr_db"] = psnr_of_error_db(means.pop("clamped_error"))
    entry: HistoryEntry = {
        "step": state.step,
        **means,
        **figures,
        "learning_rate": learning_rate,
        "seconds": state.seconds,
    }
    state.history.append(entry)
    return entry


def _shown(state: TrainState, entry: HistoryEntry | None) -> dict[str, object]:
    """The values shown beside the progress bar."""
    if entry is None:
        return {}
    shown = {name: value for name, value in entry.items() if name not in ("step", "learning_rate", "seconds")}
    return {**shown, "clips_per_s": state.num_clips / state.seconds}


def _checkpoint_is_due(state: TrainState, stop_signal: int | None, *, is_late: bool) -> bool:
    every_steps = state.settings.checkpoint_every_steps
    return (
        is_late
        or stop_signal is not None
        or state.step == state.settings.num_steps
        or (every_steps is not None and state.step % every_steps == 0)
    )


def _interrupted(state: TrainState, signal_number: int, checkpoint_path: Path | None, ranks: Ranks) -> Interrupted:
    name = signal.Signals(signal_number).name
    saved = "nothing was saved" if checkpoint_path is None else f"saved to {checkpoint_path}; run again to resume"
    error = Interrupted(
        f"Stopped by {name} after step {state.step} of {state.settings.num_steps} of phase {state.phase}: {saved}.",
        signal_number,
    )
    error.is_told_elsewhere = not ranks.is_main
    return error
