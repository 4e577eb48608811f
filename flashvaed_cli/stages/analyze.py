"""`flashvaed analyze`: measure what each stage costs, and how much its channels depend on one another.

The analysis artifact holds tensors `covariance.TENSOR` and `mean.TENSOR` (float64; TENSOR is an address of
`decoders.spec.groups`) and, in its header under `measured`, an `AnalysisRecord`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from flashvaed_cli.artifact.measured import AnalysisRecord, CalibratedClips, GroupFigures, StageFigures
from flashvaed_cli.artifact.store import write_artifact
from flashvaed_cli.calibrate.latency import measure_latency
from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import stage_costs
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.metrics.module_times import profile_modules
from flashvaed_cli.metrics.speed import synchronizer
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.numerics.independence import effective_rank
from flashvaed_cli.numerics.selection import SELECTION_RULES, unvarying_channels
from flashvaed_cli.printable import counted
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.analyze import AnalyzeRecipe
from flashvaed_cli.recipe.fields import SelectionRule
from flashvaed_cli.report.charts.analysis import explained_variance, latency_by_stage, spectra
from flashvaed_cli.report.charts.style import PAPER, save_png
from flashvaed_cli.report.tables import Column, TableData
from flashvaed_cli.stages.common.clips import find_data, plan_calibration
from flashvaed_cli.stages.common.loading import DTYPES
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.common.run import Run
from flashvaed_cli.stages.latency_model import TimedClip, measure_width_times, whole_clip
from flashvaed_cli.surgery.evidence import channel_evidence

LATENCY_BUDGET_S = 15.0
"""Seconds for the latency of the stages and layers, unless the number of rounds is given."""
SHOWN_RATIOS = (0.125, 0.25, 0.5)


def run_analyze(recipe: AnalyzeRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Calibrate on clips, measure the cost of every stage, write the analysis artifact.

    Raises:
        ArtifactError: the input cannot be loaded, or the output belongs to another program.
        MediaError: no readable clip.
        CalibrationError: NaN or dead activations.
    """
    run = Run.open(
        recipe,
        progress=progress,
        force=force,
        command_line=command_line,
        beside=plot_files(Path(recipe.output)) if recipe.plots else (),
        data=lambda: find_data(recipe.data),
    )
    if run.finished is not None:
        return run.finished
    inputs = run.load()
    device, decoder = inputs.device, inputs.checkpoint.require_decoder()
    timed = TimedClip(recipe.latency_frames, recipe.latency_side, device, recipe.dtype)
    timed = whole_clip(timed, decoder.spec, recipe, progress)
    clips = plan_calibration(
        inputs.original, recipe, recipe.num_calibration_clips, device, progress, still=decoder.spec.still
    )
    statistics = collect_statistics(decoder, clips, num_clips=len(clips), progress=progress)
    groups = _group_records(decoder, statistics, recipe.rule, recipe.seed, progress)
    stages = _stage_records(decoder, groups, recipe, timed, progress)
    times = None
    if recipe.width_latency_s is not None:
        budget_s = float(recipe.width_latency_s)
        times = measure_width_times(decoder, timed, budget_s=budget_s, seed=recipe.seed, progress=progress)
    record = AnalysisRecord(
        stages=stages,
        rule=recipe.rule,
        groups=groups,
        clips=CalibratedClips(
            num_clips=len(clips),
            skipped=clips.skipped,
            positions={address: one.count for address, one in statistics.items()},
            latency_frames=timed.num_frames,
            latency_side=timed.side,
            device=device.type,
            dtype=recipe.dtype,
        ),
        width_latency=times,
    )
    tensors = {f"covariance.{address}": one.covariance for address, one in statistics.items()}
    tensors |= {f"mean.{address}": one.mean for address, one in statistics.items()}
    header = run.header(inputs, record, kind="analysis", files=clips.files)
    write_artifact(run.output, tensors, header, force=force)
    plots = draw_plots(record, run.output) if recipe.plots else []
    tables = (_stage_table(stages, timed), _group_table(groups))
    return StageOutcome((run.output, *plots), tables, record.as_json())


def _group_records(
    decoder: Decoder, statistics: Mapping[str, TensorStatistics], rule: SelectionRule, seed: int, progress: Progress
) -> tuple[GroupFigures, ...]:
    records = []
    groups = channel_groups(decoder.spec)
    with progress.task(f"order by {rule}", len(groups)) as task:
        for index, group in enumerate(groups):
            evidence = channel_evidence(decoder, group, statistics)
            order = SELECTION_RULES[rule](evidence, group.width, seed=seed + index)
            dead, constant = unvarying_channels(evidence)
            records.append(
                GroupFigures(
                    group=group.name,
                    stage=group.stage,
                    width=group.width,
                    tensors=group.tensors,
                    effective_rank=effective_rank(evidence.covariance),
                    order=tuple(order.kept),
                    r2=tuple(order.r2),
                    spectrum=tuple(_spectrum(evidence.covariance)),
                    dead=tuple(dead),
                    constant=tuple(constant),
                )
            )
            task.advance(group=group.name)
    return tuple(records)


def _spectrum(covariance: Float64[Tensor, "C C"]) -> list[float]:
    """Shares of the variance, largest component first."""
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0.0)
    return [float(v) for v in values / values.sum()]


def _stage_records(
    decoder: Decoder, groups: Sequence[GroupFigures], recipe: AnalyzeRecipe, clip: TimedClip, progress: Progress
) -> tuple[StageFigures, ...]:
    spec = decoder.spec
    dtype = DTYPES[recipe.dtype]
    profile = partial(
        profile_modules,
        num_rounds=recipe.num_latency_rounds,
        budget_s=None if recipe.given("num_latency_rounds") else LATENCY_BUDGET_S,
        synchronize=synchronizer(clip.device),
    )
    progress.log(f"latency: {counted(clip.num_frames, 'frame')} of {clip.side} x {clip.side}")
    latency = measure_latency(decoder.to(dtype), clip.latents(spec, recipe.seed), profile)
    decoder.float()
    streams = {record.stage: record for record in groups if record.is_stream}
    return tuple(
        StageFigures(
            stage=cost.name,
            parameters=cost.parameters,
            gflop=cost.flop / 1e9,
            latency_ms=latency[cost.name],
            activation_mib=cost.peak_activation_elements * dtype.itemsize / 2**20,
            width=streams[cost.name].width if cost.name in streams else None,
            effective_rank=streams[cost.name].effective_rank if cost.name in streams else None,
        )
        for cost in stage_costs(spec, clip.grid(spec))
    )


def plot_files(output: Path) -> tuple[Path, Path, Path]:
    """Paths of the plots of an analysis: R2 curves, spectra, latency."""
    return (
        output.with_suffix(".r2.png"),
        output.with_suffix(".spectra.png"),
        output.with_suffix(".latency.png"),
    )


def draw_plots(analysis: AnalysisRecord, output: Path) -> list[Path]:
    """R2 curves, spectra and latency as PNG files beside the analysis."""
    curves: dict[str, dict[str, Sequence[float]]] = {}
    for record in sorted(analysis.groups, key=lambda one: one.group.endswith(".inner")):  # the stream is first
        curves.setdefault(record.stage, {})[_curve_name(record.group, record.stage)] = record.r2
    eigenvalues = {record.stage: record.spectrum for record in analysis.groups if record.is_stream}
    latency_ms = {record.stage: record.latency_ms for record in analysis.stages}
    figures = (
        explained_variance(curves, PAPER, title="What the kept channels leave unexplained (1 - R²)"),
        spectra(eigenvalues, PAPER, title="How few components carry a stage's stream"),
        latency_by_stage(latency_ms, PAPER, title="Where the time goes"),
    )
    return [save_png(figure, path) for figure, path in zip(figures, plot_files(output), strict=True)]


def _curve_name(group: str, stage: str) -> str:
    """`up2.0.inner` in the panel of `up2` is the inside of block 0."""
    name = group.removeprefix(f"{stage}.")
    return f"inside block {name.removesuffix('.inner')}" if name.endswith(".inner") else name


def _stage_table(stages: Sequence[StageFigures], clip: TimedClip) -> TableData:
    total = sum(sum(record.latency_ms.values()) for record in stages)
    rows = []
    for record in stages:
        operators = record.latency_ms
        ms = sum(operators.values())
        shares = sorted(operators.items(), key=lambda item: -item[1])[:3]
        shown = ", ".join(f"{name} {100 * value / ms:.0f} %" for name, value in shares if value > 0.01 * ms)
        rows.append(
            (
                record.stage,
                record.parameters,
                record.gflop,
                ms,
                100 * ms / total,
                shown,
                record.activation_mib,
                None if record.width is None else f"{record.effective_rank} of {record.width}",
            )
        )
    columns = (
        Column("stage", align="left"),
        Column("parameters", ",d"),
        Column("GFLOP", ".2f"),
        Column("ms", ".1f"),
        Column("% of time", ".1f"),
        Column("by operator", align="left"),
        Column("activations MiB", ".1f"),
        Column("components for 99 %"),
    )
    title = f"Stages, {counted(clip.num_frames, 'frame')} of {clip.side} x {clip.side}, {clip.dtype}"
    return TableData(title, columns, tuple(rows))


def _group_table(groups: Sequence[GroupFigures]) -> TableData:
    columns = (
        Column("channel group", align="left"),
        Column("width", "d"),
        Column("components for 99 %", "d"),
        *(Column(f"R2 at {ratio:g}", ".4f") for ratio in SHOWN_RATIOS),
    )
    rows = tuple(
        (
            record.group,
            record.width,
            record.effective_rank,
            *(record.r2[max(round(ratio * record.width), 1) - 1] for ratio in SHOWN_RATIOS),
        )
        for record in groups
    )
    return TableData("Variance explained by the greedily kept fraction", columns, rows)
