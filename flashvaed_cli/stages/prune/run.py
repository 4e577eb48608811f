"""`flashvaed prune`: keep the most independent channels of some stages, and refit the weights around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from flashvaed_cli.artifact.checkpoint import Checkpoint, save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader, Lineage
from flashvaed_cli.artifact.measured import (
    AnalysisRecord,
    DistillRecord,
    EncoderFigures,
    PruneRecord,
    SelectedChannels,
    WidthTimes,
)
from flashvaed_cli.artifact.store import content_sha256, read_artifact, read_header
from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import ChannelGroup, Kept, channel_groups, compose_kept, tensor_widths
from flashvaed_cli.decoders.spec.light import has_same_blocks
from flashvaed_cli.errors import ArtifactError, SpecError
from flashvaed_cli.families.registry import shallow_stages
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.fields import ANALYSIS_FILE
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.report.tables import Column, TableData
from flashvaed_cli.stages.common.asked_names import require_known_ratios
from flashvaed_cli.stages.common.clips import CalibrationClips, find_data, plan_calibration
from flashvaed_cli.stages.common.held_out import judge_held_out, summary_tables
from flashvaed_cli.stages.common.loading import DTYPES, Inputs
from flashvaed_cli.stages.common.reconstruction import (
    choose_reference,
    error_table,
    fit_settings,
    layer_figures,
    reconstruct,
)
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.common.run import Run
from flashvaed_cli.stages.info.next_step import next_commands
from flashvaed_cli.stages.prune.budget import Budget, budget_table, judge_budget, plan_budget
from flashvaed_cli.stages.prune.native import choose_native
from flashvaed_cli.stages.prune.native_encoder import narrow_encoder
from flashvaed_cli.surgery.native import native_base_width
from flashvaed_cli.surgery.respec import narrowed_spec
from flashvaed_cli.surgery.selection import GroupSelection, select_channels
from flashvaed_cli.surgery.transfer import transfer_weights

_NUM_SHOWN = 8


def run_prune(recipe: PruneRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Choose channels by the analysis, cut, reconstruct against the original, write the artifact.

    Raises:
        ArtifactError: input, original or analysis cannot be loaded or do not belong together.
        SpecError: a stage cannot be pruned, or the ratio keeps no channel.
        CalibrationError: too few positions, NaN or dead channels.
    """
    run = Run.open(
        recipe,
        progress=progress,
        force=force,
        command_line=command_line,
        reads=(recipe.analysis,),
        data=lambda: find_data(recipe.data),
    )
    if run.finished is not None:
        return run.finished
    inputs = run.load()
    device, decoder = inputs.device, inputs.checkpoint.require_decoder()
    require_known_ratios(recipe, decoder.spec)
    clips = plan_calibration(
        inputs.original, recipe, recipe.num_calibration_clips, device, progress, still=decoder.spec.still
    )
    statistics, parents, latency_model = _statistics(recipe, inputs.checkpoint, clips, progress)
    if recipe.layout == "native":
        budget, spec, kept, selections = choose_native(recipe, decoder, statistics, latency_model, device, progress)
    else:
        budget, kept, selections = _choose_free(recipe, inputs, statistics, latency_model, device, progress)
        spec = narrowed_spec(decoder.spec, kept)
    _warn_of_unvarying(selections, progress)
    student = transfer_weights(decoder, spec, kept)
    errors = []
    if recipe.reconstruct != "none":
        reference, left = choose_reference(inputs, kept, progress)
        errors = reconstruct(decoder, student, reference, left, clips, fit_settings(recipe), progress)
    encoder, encoder_record = None, None
    if recipe.with_encoder:
        encoder, encoder_record = narrow_encoder(
            inputs.original, student, native_base_width(student.spec), clips, recipe, progress
        )
    budgeted = None
    if budget is not None:
        budgeted = judge_budget(recipe, budget, decoder, student, progress)
        reached = budgeted.measured.speedup
        if recipe.target_speedup is not None and reached < 0.85 * recipe.target_speedup:
            progress.warn(
                f"asked for a speed-up of {recipe.target_speedup:g}, measured {reached:.2f}: on a busy machine measure "
                "again (flashvaed analyze), or ask for more"
            )
    judged = judge_held_out(inputs.reference(), student, inputs.original, clips, recipe, device, progress)
    record = PruneRecord(
        layout=recipe.layout,
        selection=tuple(SelectedChannels(**vars(selection)) for selection in selections),
        layer_errors=layer_figures(errors),
        parameters_before=decoder.parameter_count,
        parameters_after=student.parameter_count,
        skipped_clips=clips.skipped,
        encoder=encoder_record,
        budget=budgeted,
        held_out=judged.figures,
    )
    header = run.header(
        inputs,
        record,
        kept_channels=_kept_of_original(inputs, kept),
        parents=parents,
        files=clips.files,
        speedup=judged.speedup,
    )
    save_checkpoint(run.output, header, decoder=student, encoder=encoder, dtype=DTYPES[recipe.dtype], force=force)
    details = (_selection_table(selections, decoder, student), *error_table(errors))
    tables = [*summary_tables(judged, (decoder.parameter_count, student.parameter_count), errors)]
    tables += _encoder_table(encoder_record)
    if budgeted is not None:
        tables.append(budget_table(budgeted))
    following = next_commands(recipe.output, header, None, data=recipe.data)
    return StageOutcome(
        (run.output,),
        tuple(tables),
        {**record.as_json(), "speedup": judged.speedup},
        details=details,
        next_commands=following,
    )


def _kept_of_original(inputs: Inputs, kept: Kept) -> Kept:
    """The kept channels of the original; empty for a light decoder, whose channels are its own."""
    if not has_same_blocks(inputs.checkpoint.require_decoder().spec, inputs.reference().spec):
        return {}
    return compose_kept(inputs.checkpoint.kept_channels, kept)


def _choose_free(
    recipe: PruneRecipe,
    inputs: Inputs,
    statistics: Mapping[str, TensorStatistics],
    latency_model: WidthTimes | None,
    device: torch.device,
    progress: Progress,
) -> tuple[Budget | None, Kept, list[GroupSelection]]:
    """Kept channels with a width for each group, from ratios, from a target, or as distillation prepared them."""
    decoder = inputs.checkpoint.require_decoder()
    budget = None
    ratios, round_to = recipe.ratios(shallow_stages(decoder.spec)), recipe.round_to
    prepared = _prepared_channels(inputs.checkpoint)
    if prepared and not recipe.names_widths:
        ratios, round_to = _ratios_of(prepared, decoder.spec), 1
    if recipe.has_target:
        budget = plan_budget(recipe, decoder, statistics, latency_model, device, progress)
        assert budget.plan is not None
        ratios, round_to = budget.plan.keep_ratios, 1  # exactly the widths of the plan
    kept, selections = select_channels(
        decoder,
        statistics,
        ratios,
        rule=recipe.rule,
        round_to=round_to,
        seed=recipe.seed,
        prepared=prepared,
    )
    _report_prepared(prepared, kept, progress)
    unpruned = _unpruned(channel_groups(decoder.spec), ratios, kept, round_to)
    if not kept:
        raise SpecError(f"nothing to prune: {unpruned or f'the ratios {ratios} keep every channel'}")
    if unpruned:
        progress.warn(unpruned)
    return budget, kept, selections


def _unpruned(groups: Sequence[ChannelGroup], ratios: Mapping[str, float], kept: Kept, round_to: int) -> str | None:
    """A warning about groups that keep all channels in spite of a ratio below 1; None if there are none."""
    asked = [(group, ratios.get(group.name, ratios.get(group.stage, 1.0))) for group in groups]
    whole = [(group, ratio) for group, ratio in asked if ratio < 1 and group.tensors[0] not in kept]
    if not whole:
        return None
    named = ", ".join(f"{group.name} ({ratio:g} of {group.width})" for group, ratio in whole[:_NUM_SHOWN])
    if len(whole) > _NUM_SHOWN:
        named += f" and {len(whole) - _NUM_SHOWN} more"
    nearest, mending = "whole number of channels", "--ratio"
    if round_to == 1 and (run := max(group.run for group, _ in whole)) > 1:
        nearest = f"whole number of GroupNorm's groups (of {run} channels)"
    if round_to > 1:
        nearest, mending = f"multiple of --round-to {round_to} above 0", "--round-to"
    return f"{named}: the nearest {nearest} is all of them, so they stay as they are. Give a smaller {mending}"


def _prepared_channels(checkpoint: Checkpoint) -> Kept:
    """The channels that phase 2 of a distillation prepared the decoder to keep."""
    trained = DistillRecord.of(checkpoint.header)
    return {} if trained is None else trained.prepared_channels


def _ratios_of(prepared: Kept, spec: DecoderSpec) -> dict[str, float]:
    """The ratios by channel group that keep as many channels as phase 2 prepared."""
    groups = [group for group in channel_groups(spec) if group.tensors[0] in prepared]
    return {group.name: len(prepared[group.tensors[0]]) / group.width for group in groups}


def _report_prepared(prepared: Kept, kept: Kept, progress: Progress) -> None:
    """Report whether the kept channels are those that phase 2 prepared."""
    others = [tensor for tensor, channels in kept.items() if tensor in prepared and channels != prepared[tensor]]
    if others:
        first = others[0]
        progress.warn(
            f"phase 2 prepared {len(prepared[first])} channels of {first}, but this run keeps {len(kept[first])}, so "
            "they are chosen again. Leave out --ratio to keep the prepared ones"
        )
    elif prepared:
        progress.log("keeping the channels that phase 2 of the distillation prepared")


def _statistics(
    recipe: PruneRecipe, checkpoint: Checkpoint, clips: CalibrationClips, progress: Progress
) -> tuple[dict[str, TensorStatistics], tuple[Lineage, ...], WidthTimes | None]:
    """Statistics from the given analysis, or from `analysis.safetensors` if it is of this decoder; else measured now.

    Returns the statistics, the analysis as a parent, and its latency model.
    """
    given = recipe.analysis
    default = Path(ANALYSIS_FILE)
    if given is None and default.exists():
        belongs = _analyzed_sha256(default) == checkpoint.sha256
        progress.log(f"analysis: {default}" if belongs else f"{default} is of another decoder: measuring again")
        given = str(default) if belongs else None
    if given is None:
        decoder = checkpoint.require_decoder()
        return collect_statistics(decoder, clips, num_clips=len(clips), progress=progress), (), None
    header, tensors = read_artifact(given)
    if header.kind != "analysis":
        raise ArtifactError(f"{given} is a {header.kind}, not an analysis; make one with `flashvaed analyze`")
    if not header.parents:
        raise ArtifactError(f"{given} does not say which decoder it analyses. Run `flashvaed analyze` again.")
    if _analyzed_sha256(Path(given)) != checkpoint.sha256:
        raise ArtifactError(
            f"{given} is the analysis of {header.parents[0].location} (SHA-256 {header.parents[0].sha256[:12]}), not "
            f"of {checkpoint.location} ({checkpoint.sha256[:12]}); run `flashvaed analyze {checkpoint.location}`"
        )
    statistics = _read_statistics(given, header, tensors, checkpoint.require_decoder().spec)
    parents = (Lineage(role="analysis", location=given, sha256=content_sha256(given)),)
    analysis = AnalysisRecord.of(header)
    return statistics, parents, None if analysis is None else analysis.width_latency


def _read_statistics(
    location: str, header: ArtifactHeader, tensors: Mapping[str, torch.Tensor], spec: DecoderSpec
) -> dict[str, TensorStatistics]:
    """The statistics of every tensor that belongs to a channel group.

    Raises:
        ArtifactError: some are missing, of another shape, or not finite.
    """
    analysis = AnalysisRecord.of(header)
    positions = {} if analysis is None else analysis.clips.positions
    statistics: dict[str, TensorStatistics] = {}
    for address, width in tensor_widths(spec).items():
        count = positions.get(address)
        covariance, mean = tensors.get(f"covariance.{address}"), tensors.get(f"mean.{address}")
        fault = "is not there"
        if count is not None and covariance is not None and mean is not None:
            fits = covariance.shape == (width, width) and mean.shape == (width,) and covariance.is_floating_point()
            fault = "is not finite" if fits else f"is not of {width} channels"
            if fits and torch.isfinite(covariance).all() and torch.isfinite(mean).all():
                statistics[address] = TensorStatistics(covariance.double(), mean.double(), count)
                continue
        raise ArtifactError(f"{location}: damaged: its covariance of {address} {fault}. Run `flashvaed analyze` again.")
    return statistics


def _analyzed_sha256(path: Path) -> str | None:
    """Hash of the decoder that an analysis is of; None for anything else."""
    header = read_header(path)
    return header.parents[0].sha256 if header.kind == "analysis" and header.parents else None


def _warn_of_unvarying(selections: list[GroupSelection], progress: Progress) -> None:
    """Warn of the dead and the constant channels of every group."""
    found = []
    for selection in selections:
        for kind, channels in (("dead", selection.dead), ("constant", selection.constant)):
            if channels:
                shown = ", ".join(map(str, channels[:_NUM_SHOWN])) + (", ..." if len(channels) > _NUM_SHOWN else "")
                found.append(f"{selection.group}: {len(channels)} {kind} ({shown})")
    if found:
        progress.warn("channels that do not vary over the calibration clips are kept last. " + "; ".join(found))


def _encoder_table(record: EncoderFigures | None) -> tuple[TableData, ...]:
    if record is None:
        return ()
    columns = (
        Column("parameters", ",d"),
        Column("share of the latents' variance missed", ".4f"),
        Column("PSNR through it, dB", ".2f"),
        Column("through the original's, dB", ".2f"),
    )
    row = (record.parameters_after, record.latent_error, record.psnr_db, record.psnr_db_with_original_encoder)
    return (TableData("The narrowed encoder, on the calibration clips", columns, (row,)),)


def _selection_table(selections: list[GroupSelection], before: Decoder, after: Decoder) -> TableData:
    columns = (
        Column("channel group", align="left"),
        Column("channels", "d"),
        Column("kept", "d"),
        Column("R2 of the kept", ".4f"),
    )
    rows = tuple((s.group, s.width, len(s.kept), s.r2) for s in selections)
    title = f"Pruned: {before.parameter_count:,} to {after.parameter_count:,} parameters"
    return TableData(title, columns, rows)
