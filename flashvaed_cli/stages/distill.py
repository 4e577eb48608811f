"""`flashvaed distill`: train a decoder to give what the original gives, phase after phase."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import derived_header, save_checkpoint
from flashvaed_cli.artifact.store import refuse_overwrite
from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.families import get_family
from flashvaed_cli.distill.loop import TrainResult, train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.phases import (
    PhasePlan,
    Projection,
    plan_phase_1,
    plan_phase_2,
    plan_phase_3,
    swapped_stages,
)
from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.errors import DistillationError, MetricUnavailableError
from flashvaed_cli.metrics.lpips_metric import load_lpips
from flashvaed_cli.numerics.independence import reconstruction_map
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.models import DistillRecipe, PhaseRecipe
from flashvaed_cli.report.curves import plot_losses
from flashvaed_cli.report.tables import Column, TableData
from flashvaed_cli.stages.clips import plan_calibration
from flashvaed_cli.stages.loading import Inputs, choose_device, choose_input, load_inputs
from flashvaed_cli.stages.result import StageOutcome
from flashvaed_cli.surgery.selection import select_channels

_NUM_STATISTICS_CLIPS = 8
_COMPUTE_DTYPES = ("float32", "bfloat16")


def run_distill(recipe: DistillRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Train the phases of the recipe that fit the decoder; write the decoder and its loss curves.

    A checkpoint beside the output lets an interrupted run go on; it goes away when the output is written.

    Raises:
        ArtifactError: input or original cannot be loaded.
        MediaError: no readable clip.
        DistillationError: no phase fits the decoder, or training diverged.
        Interrupted: SIGINT or SIGTERM, after saving.
    """
    output = Path(recipe.output)
    refuse_overwrite(output, force=force)
    if recipe.dtype not in _COMPUTE_DTYPES:
        raise DistillationError(f"--dtype {recipe.dtype} does not train: use {' or '.join(_COMPUTE_DTYPES)}")
    location = choose_input(recipe.input, DistillRecipe, progress)
    device = choose_device(recipe.device)
    inputs = load_inputs(location, original=recipe.original, family=recipe.family, device=device, progress=progress)
    student, teacher = inputs.checkpoint.require_decoder(), inputs.reference()
    if teacher is student:  # an original is trained towards itself: phase 2 prepares it for pruning
        again = load_inputs(location, original=recipe.original, family=recipe.family, device=device, progress=progress)
        teacher = again.original.decoder
        assert teacher is not None
    phases = choose_phases(recipe, inputs, progress)
    pool = _encode_pool(recipe, inputs, progress)
    perceptual = _perceptual(recipe, device, progress)
    results: list[tuple[PhaseRecipe, TrainResult]] = []
    checkpoints = []
    for index, phase in enumerate(phases):
        checkpoints.append(output.with_suffix(f".phase{index + 1}.ckpt"))
        result = train(
            student,
            teacher,
            _plan(phase.phase, recipe, inputs, student, teacher, pool, progress),
            pool.batches(recipe.batch_size, recipe.seed + index),
            _settings(recipe, phase),
            checkpoint_path=checkpoints[-1],
            resume=recipe.resume == "auto",
            run_key=_run_key(recipe, inputs, index),
            perceptual=perceptual,
            progress=progress,
        )
        results.append((phase, result))
    measured = {"phases": [_phase_record(phase, result) for phase, result in results]}
    header = derived_header(
        inputs.checkpoint,
        recipe=recipe.model_dump(mode="json"),
        command_line=command_line,
        seed=recipe.seed,
        measured=measured,
    )
    save_checkpoint(output, header, decoder=student, force=force)
    curves = _draw_curves(output, results)
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)
    return StageOutcome((output, curves), (_phase_table(results),), measured)


def choose_phases(recipe: DistillRecipe, inputs: Inputs, progress: Progress) -> tuple[PhaseRecipe, ...]:
    """The recipe's phases; with `phase: all` those that do not fit the decoder are left out, and that is said.

    Raises:
        DistillationError: none fits.
    """
    schedule = recipe.schedule()
    family = get_family(inputs.checkpoint.family)
    swapped = swapped_stages(inputs.checkpoint.require_decoder().spec, inputs.reference().spec)
    misfits = {}
    if not set(swapped) - set(family.shallow_stages):
        misfits[1] = "no deep stage has another operator than the original's (run convert-ops first)"
    if inputs.checkpoint.kept_channels:
        misfits[2] = "the decoder is pruned already, and phase 2 prepares for pruning"
    if recipe.phase != "all" and (reason := misfits.get(schedule[0].phase)):
        raise DistillationError(f"phase {recipe.phase} does not fit {inputs.checkpoint.location}: {reason}")
    for phase in schedule:
        if phase.phase in misfits:
            progress.log(f"phase {phase.phase} is left out: {misfits[phase.phase]}")
    fitting = tuple(phase for phase in schedule if phase.phase not in misfits)
    if not fitting:
        raise DistillationError("no phase of the recipe fits this decoder: " + "; ".join(misfits.values()))
    return fitting


@dataclass(frozen=True)
class LatentPool:
    """Encoded clips in memory, grouped by shape so that any of a group can share a batch."""

    groups: tuple[tuple[Float[Tensor, "1 C T Hz Wz"], ...], ...]

    def batches(self, batch_size: int, seed: int) -> Callable[[int], Float[Tensor, "B C T Hz Wz"]]:
        """Step number to batch: random clips, the same for the same step whatever came before."""
        sizes = torch.tensor([float(len(group)) for group in self.groups])

        def batch(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            group = self.groups[int(torch.multinomial(sizes, 1, generator=generator))]
            picks = torch.randint(len(group), (batch_size,), generator=generator)
            return torch.cat([group[int(i)] for i in picks])

        return batch

    def first(self, count: int) -> list[Float[Tensor, "1 C T Hz Wz"]]:
        """Up to `count` clips."""
        return [clip for group in self.groups for clip in group][:count]


def _encode_pool(recipe: DistillRecipe, inputs: Inputs, progress: Progress) -> LatentPool:
    drawn = recipe.batch_size * sum(phase.num_steps for phase in recipe.schedule())
    num_clips = min(recipe.num_clips, max(drawn, _NUM_STATISTICS_CLIPS))
    still = inputs.checkpoint.require_decoder().spec.still
    clips = plan_calibration(inputs.original, recipe, num_clips, inputs.device, progress, still=still)
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    with progress.task("encoding clips", len(clips)) as task:
        for latents in clips:
            for one in latents.split(1):
                by_shape.setdefault(tuple(one.shape), []).append(one)
            task.advance()
    return LatentPool(tuple(tuple(group) for group in by_shape.values()))


def _perceptual(recipe: DistillRecipe, device: torch.device, progress: Progress) -> Callable | None:
    if recipe.loss_weights.lpips == 0:
        return None
    try:
        return load_lpips("vgg", device, allow_download=recipe.allow_download)
    except MetricUnavailableError as error:
        progress.warn(f"the LPIPS loss term is left out. {error}")
        return None


def _plan(
    phase: int,
    recipe: DistillRecipe,
    inputs: Inputs,
    student: Decoder,
    teacher: Decoder,
    pool: LatentPool,
    progress: Progress,
) -> PhasePlan:
    family, kept = get_family(inputs.checkpoint.family), inputs.checkpoint.kept_channels
    if phase == 1:
        return plan_phase_1(student.spec, teacher.spec, shallow_stages=family.shallow_stages, kept_channels=kept)
    sample = pool.first(_NUM_STATISTICS_CLIPS)
    if phase == 2:
        statistics = collect_statistics(student, sample, num_clips=len(sample), progress=progress)
        ratios = recipe.ratios(family.shallow_stages)
        to_keep, _ = select_channels(student, statistics, ratios, rule=recipe.rule, seed=recipe.seed)
        return plan_phase_2(student.spec, teacher.spec, to_keep=to_keep)
    projections: dict[str, Projection] = {}
    if kept:
        statistics = collect_statistics(teacher, sample, num_clips=len(sample), progress=progress)
        for address, channels in kept.items():
            weight, bias = reconstruction_map(statistics[address].covariance, statistics[address].mean, channels)
            projections[address] = (weight.float(), bias.float())
    return plan_phase_3(student.spec, teacher.spec, projections=projections)


def _settings(recipe: DistillRecipe, phase: PhaseRecipe) -> TrainSettings:
    return TrainSettings(
        num_steps=phase.num_steps,
        learning_rate=phase.learning_rate,
        weight_decay=recipe.weight_decay,
        num_warmup_steps=min(20, -(-phase.num_steps // 4)),
        schedule="cosine",
        gradient_clip_norm=recipe.gradient_clip_norm,
        compute_dtype="bfloat16" if recipe.dtype == "bfloat16" else "float32",
        channels_last=True,
        loss_weights=LossWeights(**recipe.loss_weights.model_dump()),
        checkpoint_every_steps=recipe.checkpoint_every_steps,
    )


def _run_key(recipe: DistillRecipe, inputs: Inputs, index: int) -> str:
    """Equal for runs that would give the same weights: recipe and decoder, wherever they are written."""
    settings = recipe.model_dump(mode="json", exclude={"output", "resume", "checkpoint_every_steps", "input"})
    text = json.dumps([settings, inputs.checkpoint.sha256, inputs.original.sha256, index], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _phase_record(phase: PhaseRecipe, result: TrainResult) -> dict[str, Any]:
    return {
        "phase": phase.phase,
        "num_steps": result.num_steps,
        "seconds": result.seconds,
        "clips_per_s": result.clips_per_s,
        "resumed_from": result.resumed_from,
        "absent_terms": list(result.absent_terms),
        "history": result.history,
    }


def _draw_curves(output: Path, results: list[tuple[PhaseRecipe, TrainResult]]) -> Path:
    """Every loss term and the PSNR to the original over all phases."""
    curves: dict[str, list[tuple[float, float]]] = {}
    done = 0
    for _, result in results:
        for entry in result.history:
            for name, value in entry.items():
                if name not in ("step", "seconds", "learning_rate"):
                    curves.setdefault(name, []).append((done + entry["step"], value))
        done += result.num_steps
    return plot_losses(output.with_suffix(".losses.png"), curves)


def _phase_table(results: list[tuple[PhaseRecipe, TrainResult]]) -> TableData:
    columns = (
        Column("phase", "d"),
        Column("steps", "d"),
        Column("loss, first", ".4f"),
        Column("last", ".4f"),
        Column("PSNR to original dB, first", ".2f"),
        Column("last", ".2f"),
        Column("clips/s", ".2f"),
        Column("minutes", ".1f"),
    )
    rows = []
    for phase, result in results:
        first, last = (result.history[i] if result.history else {} for i in (0, -1))
        figures = [_get(entry, name) for name in ("loss", "psnr_db") for entry in (first, last)]
        rows.append((phase.phase, result.num_steps, *figures, result.clips_per_s, result.seconds / 60))
    return TableData("Distillation", columns, tuple(rows))


def _get(entry: Mapping[str, float], name: str) -> float | None:
    return entry.get(name)
