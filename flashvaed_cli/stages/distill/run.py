"""`flashvaed distill`: train a decoder to reproduce the original's frames, phase after phase."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.measured import DistillRecord, NewStudent, SameClips
from flashvaed_cli.atomic import remove_leftovers
from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.groups import Kept
from flashvaed_cli.decoders.spec.light import has_same_blocks
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.distill.loop import train
from flashvaed_cli.distill.losses import LossWeights
from flashvaed_cli.distill.objective import Perceptual
from flashvaed_cli.distill.phases import (
    PhasePlan,
    Projection,
    plan_other_shape,
    plan_phase_1,
    plan_phase_2,
    plan_phase_3,
    swapped_stages,
)
from flashvaed_cli.distill.ranks import Ranks, joined_ranks
from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.errors import DistillationError, MetricUnavailableError
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.metrics.lpips_metric import load_lpips
from flashvaed_cli.metrics.quality import compare_frames, mean_quality
from flashvaed_cli.numerics.independence import reconstruction_map
from flashvaed_cli.paths import user_path
from flashvaed_cli.progress import Progress, SilentProgress
from flashvaed_cli.recipe.distill import DistillRecipe, PhaseRecipe
from flashvaed_cli.stages.common.asked_names import require_known_ratios
from flashvaed_cli.stages.common.clips import find_data
from flashvaed_cli.stages.common.fitted_clips import fitted_to_vae
from flashvaed_cli.stages.common.loading import Inputs, choose_device, warn_of_slow_format
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.common.run import Run
from flashvaed_cli.stages.common.run_watch import RunWatch
from flashvaed_cli.stages.distill.clip_source import NUM_STATISTICS_CLIPS
from flashvaed_cli.stages.distill.data import TrainingData, training_data
from flashvaed_cli.stages.distill.files import TrainingFiles, describe_checkpoints
from flashvaed_cli.stages.distill.report import PhaseResult, draw_curves, phase_record, phase_table, same_clips_table
from flashvaed_cli.stages.distill.student import give_first_weights, with_new_student
from flashvaed_cli.stages.distill.validation import Validation, open_validation
from flashvaed_cli.stages.distill.watch import SampleStrips, TensorBoardLog, TrainingLog, TrainingWatch
from flashvaed_cli.stages.info.next_step import next_commands
from flashvaed_cli.surgery.selection import select_channels

_COMPUTE_DTYPES = ("float32", "bfloat16")


_NUM_COMPARED = 2
"""Training clips on which the student is compared before and after."""


def run_distill(recipe: DistillRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Train the phases of the recipe that fit the decoder; write the decoder, its loss curves and its log.

    A checkpoint per phase beside the output lets an interrupted run go on; they are deleted once the output is written.
    Started by `accelerate launch` or torchrun, all processes train together; only the main one writes and logs.

    Raises:
        ArtifactError: input or original cannot be loaded.
        MediaError: no readable clip.
        DistillationError: no phase fits the decoder, or training diverged.
        Interrupted: SIGINT or SIGTERM, after saving.
    """

    def data() -> list[Path]:
        return [*find_data(recipe.data), *(find_data(recipe.validation_data) if recipe.validation_data else ())]

    run = Run.open(
        recipe,
        progress=progress,
        force=force,
        command_line=command_line,
        beside=TrainingFiles(user_path(recipe.output)).replaced(),
        data=data,
    )
    if run.finished is not None:
        return run.finished
    if recipe.dtype not in _COMPUTE_DTYPES:
        raise DistillationError(f"--dtype {recipe.dtype} does not train: use {' or '.join(_COMPUTE_DTYPES)}")
    files = TrainingFiles(run.output)
    with joined_ranks(choose_device(recipe.device)) as (ranks, device), ExitStack() as until_the_end:
        ranks.from_main(lambda: until_the_end.enter_context(files.alone()))
        try:
            run = replace(
                run,
                recipe=recipe.model_copy(update={"input": run.location}),
                progress=progress if ranks.is_main else SilentProgress(),
                watch=RunWatch(),
            )
            return _run_alone(run, ranks, device, files)
        except KeyboardInterrupt as error:
            _note_what_is_kept(error, recipe, files)
            raise


def _run_alone(run: Run[DistillRecipe], ranks: Ranks, device: torch.device, files: TrainingFiles) -> StageOutcome:
    recipe, progress = run.recipe, run.progress
    job = _prepare(run, ranks, device)
    clips = job.data.first(_NUM_COMPARED) if ranks.is_main else []
    is_resumed = recipe.resume == "auto" and bool(files.checkpoints(len(job.phases)))
    if clips and not is_resumed:  # a run goes on in its own format only
        num_drawn = recipe.batch_size * recipe.gradient_accumulation * sum(phase.num_steps for phase in job.phases)
        grid = (clips[0].shape[2], clips[0].shape[3], clips[0].shape[4])
        gflop = num_drawn * total_gflop(job.teacher.spec, grid)
        warn_of_slow_format(recipe.dtype, device, gflop, progress)
    before = _psnr_db(job, clips)
    results, prepared = _train_phases(job, files, progress)
    after = _psnr_db(job, clips)
    student = None
    if recipe.student is not None:
        width = job.student.spec.stage("head").blocks[0].in_width
        student = NewStudent(shape=recipe.student, width=width, start=job.start or "random")
    record = DistillRecord(
        data=job.data.record(),
        phases=tuple(phase_record(phase, result) for phase, result in results),
        num_processes=ranks.count,
        prepared_channels=dict(prepared),
        same_clips=SameClips(num_clips=len(clips), psnr_db_before=before, psnr_db_after=after),
        student=student,
    )
    header = run.header(job.inputs, record, files=job.data.files)
    curves = ranks.from_main(lambda: _finish(files, header, job, results, progress, force=run.force))
    tables = (phase_table(results), same_clips_table(before, after, len(clips)))
    following = next_commands(recipe.output, header, None, data=recipe.data)
    return StageOutcome((files.output, *curves, files.log), tables, record.as_json(), next_commands=following)


@torch.no_grad()
def _psnr_db(job: _Job, clips: Sequence[Tensor]) -> float:
    """PSNR to the original's output, always on the same clips; identical frames count `PSNR_CAP_DB`."""
    student, teacher = exact_decoder(job.student), exact_decoder(job.teacher)
    results = [compare_frames(decode(student, latents), decode(teacher, latents)) for latents in clips]
    return mean_quality(results).psnr_db if results else 0.0


def _note_what_is_kept(error: KeyboardInterrupt, recipe: DistillRecipe, files: TrainingFiles) -> None:
    """Add to the interruption's message how to resume, and what is kept."""
    if kept := files.checkpoints(len(recipe.schedule())):
        how = "run again" if recipe.resume == "auto" else "run without --resume never"
        error.add_note(f"{how} to resume from {describe_checkpoints(kept[-1:])}")
    if recipe.cache_latents is not None and user_path(recipe.cache_latents).exists():
        error.add_note(f"the encoded clips are kept in {recipe.cache_latents}")


@dataclass(frozen=True)
class _Job:
    """Everything that the phases share; `start`: the errors of a new student's first weights."""

    recipe: DistillRecipe
    ranks: Ranks
    inputs: Inputs
    student: Decoder
    teacher: Decoder
    phases: tuple[PhaseRecipe, ...]
    data: TrainingData
    perceptual: Perceptual | None
    validation: Validation | None
    start: dict[str, float] | None

    @property
    def left_out(self) -> tuple[str, ...]:
        """Loss terms that phases need not warn of: warned of already, or meaningless for a light student."""
        absent = ("lpips",) if self.recipe.loss_weights.lpips and self.perceptual is None else ()
        return absent if has_same_blocks(self.student.spec, self.teacher.spec) else (*absent, "feature")


def _prepare(run: Run[DistillRecipe], ranks: Ranks, device: torch.device) -> _Job:
    recipe, progress = run.recipe, run.progress
    inputs = with_new_student(recipe, run.load(device), progress)
    student, teacher = inputs.checkpoint.require_decoder(), inputs.reference()
    if next(teacher.parameters()) is next(student.parameters()):
        teacher = copy.deepcopy(teacher)  # an original is trained towards itself: phase 2 prepares it for pruning
    phases = choose_phases(recipe, inputs, progress)
    unused = {"crop_size": bool(recipe.buckets), "num_frames": bool(recipe.buckets) and not recipe.validation_data}
    recipe = fitted_to_vae(
        recipe,
        inputs.original,
        progress,
        still=student.spec.still,
        unused=[name for name, is_unused in unused.items() if is_unused],
    )
    clips_per_step = recipe.batch_size * recipe.gradient_accumulation * ranks.count
    validation = open_validation(recipe, inputs, student, teacher, progress) if ranks.is_main else None
    data = training_data(
        recipe,
        inputs,
        progress,
        is_main=ranks.is_main,
        wait=ranks.wait,
        num_drawn=clips_per_step * sum(phase.num_steps for phase in phases),
    )
    start = give_first_weights(recipe, student, teacher, data, progress) if ranks.is_main else None
    perceptual = _perceptual(recipe, ranks, device, progress)
    return _Job(recipe, ranks, inputs, student, teacher, phases, data, perceptual, validation, start)


def _train_phases(job: _Job, files: TrainingFiles, progress: Progress) -> tuple[list[PhaseResult], Kept]:
    """Train one phase after the other, each with its own checkpoint; a finished phase is not trained again.

    Returns the result of each, and the channels that phase 2 prepared the decoder to keep.
    """
    recipe, ranks = job.recipe, job.ranks
    watch = _open_watch(job, files, progress) if ranks.is_main else None
    given_up = _given_up(job, files, progress) if ranks.is_main else []
    results: list[PhaseResult] = []
    prepared: Kept = {}
    done = 0
    for index, phase in enumerate(job.phases, start=1):
        plan = ranks.from_main(lambda number=phase.phase: _plan(number, job, progress))
        batches = job.data.draw(
            batch_size=recipe.batch_size,
            num_micro_batches=recipe.gradient_accumulation,
            seed=recipe.seed + index - 1,
            rank=ranks.rank,
            num_ranks=ranks.count,
        )
        result = train(
            job.student,
            job.teacher,
            plan,
            batches,
            _settings(recipe, phase),
            checkpoint_path=files.checkpoint(index),
            resume=recipe.resume == "auto",
            replaces=[path for path in given_up if path != files.checkpoint(index)],
            run_key=_run_key(job, index),
            perceptual=job.perceptual,
            told_absent=job.left_out,
            progress=progress,
            ranks=ranks,
            validate=job.validation,
            after_step=None if watch is None else watch.for_phase(index, phase.phase, done),
        )
        results.append((phase, result))
        prepared |= plan.to_keep
        done += result.num_steps
        given_up = []  # from now on, files of these names belong to this run
    return results, prepared


def _given_up(job: _Job, files: TrainingFiles, progress: Progress) -> list[Path]:
    """Existing checkpoints that this run will not resume from; logs them."""
    if job.recipe.resume == "auto" or not (found := files.checkpoints(len(job.phases))):
        return []
    progress.warn(
        f"--resume never: starting over. The first checkpoint of this run replaces "
        f"{describe_checkpoints(found)}; until then, a run without --resume never continues from there"
    )
    return found


def _finish(
    files: TrainingFiles,
    header: ArtifactHeader,
    job: _Job,
    results: list[PhaseResult],
    progress: Progress,
    *,
    force: bool,
) -> list[Path]:
    """Write the decoder, and the curves if they can be; returns the file of these."""
    encoder = job.inputs.checkpoint.own_encoder
    save_checkpoint(files.output, header, decoder=job.student, encoder=encoder, force=force)
    for index in range(1, len(results) + 1):  # before anything else can fail: they are of no use any more
        files.checkpoint(index).unlink(missing_ok=True)
        remove_leftovers(files.checkpoint(index))
    try:
        return [draw_curves(files.output, results)]
    except OSError as error:
        progress.warn(
            f"the decoder is written, but its loss curves are not: {files.curves}: {error.strerror}. {files.log} has "
            "the figures"
        )
        return []


def _open_watch(job: _Job, files: TrainingFiles, progress: Progress) -> TrainingWatch:
    recipe = job.recipe
    resumes = recipe.resume == "auto" and files.checkpoint(1).exists()
    log = TrainingLog(files.log, _run_key(job, 0), resumes=resumes)
    board = None if recipe.tensorboard is None else TensorBoardLog(Path(recipe.tensorboard))
    strips = None
    if recipe.sample_every_minutes is not None:
        (latents,) = job.data.first(1)
        every_s = 60 * recipe.sample_every_minutes
        strips = SampleStrips(files.samples, latents, job.student, job.teacher, every_s=every_s)
    return TrainingWatch(progress, log, board, strips)


def choose_phases(recipe: DistillRecipe, inputs: Inputs, progress: Progress) -> tuple[PhaseRecipe, ...]:
    """The recipe's phases; with `phase: all` those that do not fit the decoder are left out, with a log message.

    Raises:
        DistillationError: none fits.
        SpecError: phase 2 is to prepare a stage or channel group that the decoder lacks.
    """
    schedule = recipe.schedule()
    family = get_family(inputs.checkpoint.family)
    student, teacher = inputs.checkpoint.require_decoder().spec, inputs.reference().spec
    swapped = swapped_stages(student, teacher)
    misfits: dict[int, str] = {}
    if not has_same_blocks(student, teacher):
        misfits = dict.fromkeys((1, 2), "its blocks are not the original's, so only frames compare: phase 3 alone fits")
    elif not set(swapped) - set(family.shallow_stages):
        misfits[1] = "no deep stage has another operator than the original's (run convert-ops first)"
    if inputs.checkpoint.kept_channels:
        misfits[2] = "the decoder is pruned already, and phase 2 prepares for pruning"
    if recipe.phase != "all" and (reason := misfits.get(schedule[0].phase)):
        trained = inputs.checkpoint.location if recipe.student is None else f"a new {recipe.student}"
        raise DistillationError(f"phase {recipe.phase} does not fit {trained}: {reason}")
    for phase in schedule:
        if phase.phase in misfits:
            progress.log(f"phase {phase.phase} is left out: {misfits[phase.phase]}")
    fitting = tuple(phase for phase in schedule if phase.phase not in misfits)
    longest = max((phase.num_steps for phase in fitting), default=0)
    if recipe.loss_weights.adversarial and 0 < longest <= recipe.adversarial_start:
        progress.warn(
            f"--adversarial-start {recipe.adversarial_start}: no phase has more than {longest} steps, so the "
            "adversarial term never begins"
        )
    if any(phase.phase == 2 for phase in fitting):
        require_known_ratios(recipe, inputs.checkpoint.require_decoder().spec)
    if not fitting:
        raise DistillationError("no phase of the recipe fits this decoder: " + "; ".join(misfits.values()))
    return fitting


def _perceptual(recipe: DistillRecipe, ranks: Ranks, device: torch.device, progress: Progress) -> Perceptual | None:
    """The LPIPS term, or None, alike on all ranks. Only the main one downloads."""
    if recipe.loss_weights.lpips == 0:
        return None

    def load() -> Perceptual:
        return load_lpips("vgg", device, allow_download=recipe.allow_download)

    missing = ranks.from_main(lambda: _what_is_missing(load))
    if missing is not None:
        progress.warn(missing)
        return None
    return load()


def _what_is_missing(load: Callable[[], object]) -> str | None:
    try:
        load()
    except MetricUnavailableError as error:
        return f"no LPIPS in the loss: {error.short or error}"
    return None


def _plan(phase: int, job: _Job, progress: Progress) -> PhasePlan:
    recipe, student, teacher = job.recipe, job.student, job.teacher
    family, kept = get_family(job.inputs.checkpoint.family), job.inputs.checkpoint.kept_channels
    if not has_same_blocks(student.spec, teacher.spec):
        return plan_other_shape(student.spec)
    if phase == 1:
        return plan_phase_1(student.spec, teacher.spec, shallow_stages=family.shallow_stages, kept_channels=kept)
    sample = [latents.to(job.inputs.device) for latents in job.data.first(NUM_STATISTICS_CLIPS)]
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
            projections[address] = (weight.float().cpu(), bias.float().cpu())
    return plan_phase_3(student.spec, teacher.spec, projections=projections)


def _settings(recipe: DistillRecipe, phase: PhaseRecipe) -> TrainSettings:
    every_minutes = recipe.checkpoint_every_minutes
    return TrainSettings(
        num_steps=phase.num_steps,
        optimizer=recipe.optimizer,
        learning_rate=phase.learning_rate,
        weight_decay=recipe.weight_decay,
        max_relative_step=recipe.max_relative_step,
        num_warmup_steps=recipe.warmup_steps(phase),
        schedule=recipe.learning_rate_schedule,
        gradient_clip_norm=recipe.gradient_clip_norm,
        ema_decay=recipe.ema_decay,
        compute_dtype="bfloat16" if recipe.dtype == "bfloat16" else "float32",
        channels_last=True,
        checkpoint_activations=recipe.checkpoint_activations,
        compile=recipe.compile,
        loss_weights=LossWeights(**recipe.loss_weights.model_dump()),
        adversarial_start=recipe.adversarial_start,
        validate_every_steps=recipe.validate_every_steps,
        checkpoint_every_steps=recipe.checkpoint_every_steps,
        checkpoint_every_s=None if every_minutes is None else 60 * every_minutes,
    )


_NO_PART_OF_THE_RUN = {
    "input",
    "output",
    "data",  # the data's own key identifies its content
    "validation_data",
    "validate_every_steps",
    "num_workers",
    "cache_latents",
    "allow_download",
    "resume",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "checkpoint_activations",
    "compile",
    "sample_every_minutes",
    "tensorboard",
}


def _run_key(job: _Job, index: int) -> str:
    """A key of recipe, decoder and data, wherever they are stored: equal for runs that would give the same weights."""
    settings = job.recipe.model_dump(mode="json", exclude=_NO_PART_OF_THE_RUN)
    for later in ("weights", "student", "student_width", "student_start", "adversarial_start"):
        if not settings[later]:  # so that runs of version 0.3, which had no such setting, can go on
            del settings[later]
    for later in ("wavelet", "adversarial"):
        if not settings["loss_weights"][later]:
            del settings["loss_weights"][later]
    has_lpips = job.perceptual is not None
    parts = [settings, job.inputs.checkpoint.sha256, job.inputs.original.sha256, job.data.key, has_lpips, index]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
