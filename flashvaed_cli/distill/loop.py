"""One training loop for every phase. It reads from top to bottom in `train`."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.operators import frames_as_batch
from flashvaed_cli.distill.averaging import WeightAverage
from flashvaed_cli.distill.checkpoint import HistoryEntry, TrainState, load_checkpoint, save_checkpoint
from flashvaed_cli.distill.features import FeatureMatcher, run_with_features
from flashvaed_cli.distill.interrupts import stop_wish
from flashvaed_cli.distill.losses import FRAME_LOSSES, LossWeights, r2_loss, teacher_psnr_db
from flashvaed_cli.distill.phases import PhasePlan, gradient_masks, trained_parameters
from flashvaed_cli.distill.settings import TrainSettings, learning_rate_at
from flashvaed_cli.errors import DistillationError, Interrupted
from flashvaed_cli.progress import Progress, SilentProgress

Batches = Callable[[int], Tensor]
"""Step number to raw latents `[B, C, T, Hz, Wz]`: the same batch for the same number, always."""

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Perceptual distance of two sets of images `[N, 3, H, W]` in about [-1, 1]; its mean is taken."""

_SMALLEST_FIRST_LOSS = 1.0  # a student that starts as its teacher may get worse before it gets better


@dataclass(frozen=True)
class TrainResult:
    """What a phase gave; the weights are in the student.

    Attributes:
        history: means of the loss terms (unweighted), `loss` (weighted sum), `psnr_db` to the teacher's frames,
            `gradient_norm`, `learning_rate`, and `step` and `seconds` at the end of the entry.
        num_steps: steps done, those before a resumption included.
        seconds, data_seconds: spent on steps, and, of these, on waiting for batches.
        clips_per_s: throughput over `seconds`.
        resumed_from: the step at which a checkpoint was taken up.
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
    run_key: str = "",
    perceptual: Perceptual | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train the student in place to give the teacher's frames and features.

    On the CPU a run that was stopped and resumed ends with the same weights, bit for bit, as one that was not.

    Args:
        batches: raw latents of a step, on any device.
        checkpoint_path: where to save; the file of a finished phase stays (resuming it does no step)
            and is the caller's to delete.
        resume: go on from `checkpoint_path` if it is there.
        run_key: names the run in the checkpoint; see `TrainState`.
        perceptual: the LPIPS term; without it the term is absent, and the result says so.
    Raises:
        DistillationError: half-precision weights, latents that do not fit, a checkpoint of another run, a
            NaN or exploding loss, a checkpoint that cannot be written.
        Interrupted: SIGINT or SIGTERM, after saving.
    """
    progress = progress or SilentProgress()
    state = _start(student, plan, settings, run_key)
    masks = gradient_masks(student, plan)
    active, absent = choose_terms(settings.loss_weights, plan, perceptual)
    _report_gaps(progress, absent, plan)
    resumed_from = _resume(state, checkpoint_path, progress) if resume else None
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
            latents = _checked(batches(state.step), student).to(state.device)
            state.data_seconds += time.perf_counter() - began

            terms, psnr_db = compute_terms(student, teacher, latents, plan, state.matcher, active, settings, perceptual)
            loss = torch.stack([getattr(settings.loss_weights, name) * term for name, term in terms.items()]).sum()
            _require_sane_loss(float(loss.detach()), state, checkpoint_path)

            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for name, mask in masks.items():
                if (gradient := state.parameters[name].grad) is not None:
                    gradient.mul_(mask)
            gradient_norm = _clip_gradients(state, settings.gradient_clip_norm)
            _require_finite_gradient(gradient_norm, state, checkpoint_path)

            learning_rate = learning_rate_at(state.step, settings)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate
            state.optimizer.step()
            if state.average is not None:
                state.average.update(state.parameters)

            state.step += 1
            state.num_clips += len(latents)
            state.seconds += time.perf_counter() - began
            state.terms.add({"loss": loss, **terms, "psnr_db": psnr_db, "gradient_norm": gradient_norm})
            task.advance(1, **_log(state, learning_rate))

            if checkpoint_path is not None and _checkpoint_is_due(state, wish.signal_number, saved_at):
                save_checkpoint(state, checkpoint_path)
                saved_at = time.monotonic()
            if wish.signal_number is not None:
                raise _interrupted(state, wish.signal_number, checkpoint_path)
    if state.average is not None:
        state.average.copy_to(state.parameters)
    return TrainResult(
        history=state.history,
        num_steps=state.step,
        seconds=state.seconds,
        data_seconds=state.data_seconds,
        clips_per_s=state.num_clips / max(state.seconds, 1e-9),
        resumed_from=resumed_from,
        absent_terms=absent,
        unmatched=plan.unmatched,
    )


def choose_terms(
    weights: LossWeights, plan: PhasePlan, perceptual: Perceptual | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The terms that a phase computes, and those with a weight that it cannot.

    L_ce belongs to phase 2: that it plays no part in the others is no gap.
    """
    possible = {
        **dict.fromkeys(FRAME_LOSSES, True),
        "lpips": perceptual is not None,
        "feature": bool(plan.matches),
        "l_ce": bool(plan.to_keep),
    }
    wanted = [name for name in possible if getattr(weights, name) > 0 and (name != "l_ce" or plan.number == 2)]
    active = tuple(name for name in wanted if possible[name])
    if not active:
        raise DistillationError("Every loss term is switched off or cannot be computed: give l1 a weight.")
    return active, tuple(name for name in wanted if not possible[name])


def compute_terms(
    student: Decoder,
    teacher: Decoder,
    latents: Float[Tensor, "B C T Hz Wz"],
    plan: PhasePlan,
    matcher: FeatureMatcher,
    active: Collection[str],
    settings: TrainSettings,
    perceptual: Perceptual | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The unweighted loss terms of one batch, and the PSNR (dB) to the teacher's frames."""
    if settings.channels_last:
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
    matched = matcher.addresses if "feature" in active else ()
    watched = {*matched, *(plan.to_keep if "l_ce" in active else ())}
    half = settings.compute_dtype == "bfloat16"
    with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=half):
        with torch.no_grad():
            target, target_features = run_with_features(teacher, latents, matched)
        frames, features = run_with_features(student, latents, watched)
    frames, target = frames.float(), target.float()
    terms = {name: loss(frames, target) for name, loss in FRAME_LOSSES.items() if name in active}
    if "lpips" in active:
        assert perceptual is not None
        terms["lpips"] = perceptual(frames_as_batch(frames), frames_as_batch(target)).mean()
    if "feature" in active:
        terms["feature"] = matcher(features, target_features)
    if "l_ce" in active:
        terms["l_ce"] = torch.stack([r2_loss(features[a].float(), kept) for a, kept in plan.to_keep.items()]).mean()
    return terms, teacher_psnr_db(frames, target)


def _start(student: Decoder, plan: PhasePlan, settings: TrainSettings, run_key: str) -> TrainState:
    parameters = trained_parameters(student, plan)
    if any(parameter.dtype != torch.float32 for parameter in student.parameters()):
        raise DistillationError(
            "Weights must be float32 to train: small steps are lost in half precision. "
            "Set the dtype to float32, and the compute dtype to bfloat16 for speed."
        )
    matcher = FeatureMatcher(plan.matches).to(next(student.parameters()).device)
    held = gradient_masks(student, plan)
    groups = [
        {"params": [p for name, p in parameters.items() if name not in held]},
        # Weight decay would move the held rows although their gradient is masked.
        {"params": [p for name, p in parameters.items() if name in held], "weight_decay": 0.0},
        {"params": list(matcher.parameters())},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    average = None if settings.ema_decay is None else WeightAverage(parameters, settings.ema_decay)
    return TrainState(
        student=student,
        matcher=matcher,
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        phase=plan.number,
        settings=settings,
        run_key=run_key,
    )


def _resume(state: TrainState, path: Path | None, progress: Progress) -> int | None:
    if path is None or not path.exists():
        return None
    load_checkpoint(state, path)
    progress.log(f"going on from step {state.step} of {state.settings.num_steps} ({path})")
    return state.step


def _report_gaps(progress: Progress, absent: Collection[str], plan: PhasePlan) -> None:
    if absent:
        progress.warn(f"distill phase {plan.number} runs without the loss terms {', '.join(absent)}")
    if plan.unmatched:
        progress.warn(
            f"distill phase {plan.number} cannot match the features of {', '.join(plan.unmatched)}: they are "
            "narrower than the original's, and nothing says which channels were kept"
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


def _clip_gradients(state: TrainState, longest: float | None) -> Float[Tensor, ""]:
    trained = [*state.parameters.values(), *state.matcher.parameters()]
    return nn.utils.clip_grad_norm_(trained, math.inf if longest is None else longest)


def _require_sane_loss(loss: float, state: TrainState, checkpoint_path: Path | None) -> None:
    if state.first_loss is None and math.isfinite(loss):
        state.first_loss = loss
    limit = state.settings.explosion_factor * max(state.first_loss or 0.0, _SMALLEST_FIRST_LOSS)
    if not math.isfinite(loss):
        raise _diverged(f"the loss is {loss}", state, checkpoint_path)
    if loss > limit:
        raise _diverged(
            f"the loss is {loss:.3g}, {loss / (state.first_loss or 1):.0f} times the first", state, checkpoint_path
        )


def _require_finite_gradient(norm: Tensor, state: TrainState, checkpoint_path: Path | None) -> None:
    if not math.isfinite(float(norm)):
        raise _diverged(f"the gradient's norm is {float(norm)}", state, checkpoint_path)


def _diverged(what: str, state: TrainState, checkpoint_path: Path | None) -> DistillationError:
    saved = state.saved_step is not None
    good = (
        f"the last good checkpoint is {checkpoint_path} (step {state.saved_step})" if saved else "nothing was saved yet"
    )
    return DistillationError(
        f"Phase {state.phase} stopped at step {state.step + 1} of {state.settings.num_steps}: {what}; {good}. "
        f"Lower the learning rate (now {state.settings.learning_rate:g}) or look for bad clips."
    )


def _log(state: TrainState, learning_rate: float) -> dict[str, object]:
    """Close an entry of the history where one is due; returns what to show beside the progress bar."""
    if state.step % state.settings.log_every_steps and state.step != state.settings.num_steps:
        return {}
    means = state.terms.take()
    state.history.append({"step": state.step, **means, "learning_rate": learning_rate, "seconds": state.seconds})
    return {**means, "clips_per_s": state.num_clips / state.seconds}


def _checkpoint_is_due(state: TrainState, signal_number: int | None, saved_at: float) -> bool:
    settings = state.settings
    every_steps, every_s = settings.checkpoint_every_steps, settings.checkpoint_every_s
    return (
        signal_number is not None
        or state.step == settings.num_steps
        or (every_steps is not None and state.step % every_steps == 0)
        or (every_s is not None and time.monotonic() - saved_at >= every_s)
    )


def _interrupted(state: TrainState, signal_number: int, checkpoint_path: Path | None) -> Interrupted:
    name = signal.Signals(signal_number).name
    saved = "nothing was saved" if checkpoint_path is None else f"saved to {checkpoint_path}; run again to go on"
    return Interrupted(
        f"Stopped by {name} after step {state.step} of {state.settings.num_steps} of phase {state.phase}: {saved}.",
        signal_number,
    )
