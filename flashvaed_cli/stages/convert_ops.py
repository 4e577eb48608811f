"""`flashvaed convert-ops`: cheaper operators with refitted weights, or faster ones that give the same frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flashvaed_cli.artifact.checkpoint import save_checkpoint
from flashvaed_cli.artifact.measured import ConversionRecord
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.spec.addresses import stage_of
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.decoders.variants.exact import exact_changes, exact_decoder
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.errors import SpecError
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.convert_ops import ConvertOpsRecipe
from flashvaed_cli.report.tables import Column, TableData
from flashvaed_cli.stages.common.asked_names import require_known_operators, require_own_blocks
from flashvaed_cli.stages.common.clips import find_data, plan_calibration
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
from flashvaed_cli.surgery.respec import converted_spec, with_time_rank
from flashvaed_cli.surgery.transfer import transfer_weights

_EXACT_CHECK_GRID = (3, 6, 8)
_UNUSED_BY_EXACT = (
    "data",
    "latent_scale",
    "num_calibration_clips",
    "num_frames",
    "crop_size",
    "max_side",
    "reconstruct",
    "dampening_frac",
    "num_separable_iterations",
)


def run_convert_ops(recipe: ConvertOpsRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Convert, reconstruct against the original, write the artifact.

    Raises:
        ArtifactError: input or original cannot be loaded.
        SpecError: a stage is unknown, or its operator cannot become the one asked for.
        CalibrationError: too few positions or NaN.
    """
    run = Run.open(
        recipe, progress=progress, force=force, command_line=command_line, data=lambda: find_data(recipe.data)
    )
    if run.finished is not None:
        return run.finished
    inputs = run.load()
    device, decoder = inputs.device, inputs.checkpoint.require_decoder()
    if recipe.profile == "exact":
        return _convert_exactly(run, inputs, exact_decoder(decoder))
    if recipe.profile == "image":
        return _convert_exactly(run, inputs, still_decoder(decoder))
    require_own_blocks(decoder.spec, run.location)
    require_known_operators(recipe, decoder.spec)
    operators: dict[str, Operator] = {**get_family(inputs.checkpoint.family).paper_operators, **recipe.operators}
    spec = converted_spec(decoder.spec, operators)
    if recipe.time_rank is not None:
        spec = with_time_rank(spec, recipe.time_rank)
    if spec == decoder.spec:
        raise SpecError(f"{run.location}: every stage has the operator asked for already; nothing to convert")
    student = transfer_weights(decoder, spec, {})
    errors, skipped, data, clips = [], {}, [], None
    if recipe.reconstruct != "none":
        clips = plan_calibration(
            inputs.original, recipe, recipe.num_calibration_clips, device, progress, still=decoder.spec.still
        )
        settings = fit_settings(recipe, num_separable_iterations=recipe.num_separable_iterations)
        reference, kept = choose_reference(inputs, {}, progress)
        errors = reconstruct(decoder, student, reference, kept, clips, settings, progress)
        skipped, data = clips.skipped, clips.files
    judged = judge_held_out(inputs.reference(), student, inputs.original, clips, recipe, device, progress)
    record = ConversionRecord(
        operators=dict(operators),
        time_ranks={address: layer.rank for address, layer in spec.layers() if layer.rank is not None},
        layer_errors=layer_figures(errors),
        skipped_clips=skipped,
        held_out=judged.figures,
        gflop_9x256x256_before=_gflop(decoder.spec),
        gflop_9x256x256_after=_gflop(student.spec),
    )
    tables = summary_tables(judged, (decoder.parameter_count, student.parameter_count), errors)
    details = (_operator_table(decoder, student), *error_table(errors))
    outcome = _written(run, inputs, student, record, tables, files=data, speedup=judged.speedup)
    return replace(outcome, details=details, figures={**outcome.figures, "speedup": judged.speedup})


def _convert_exactly(run: Run[ConvertOpsRecipe], inputs: Inputs, converted: Decoder) -> StageOutcome:
    """Swap in faster operators for the same frames; needs no data and fits no weights. The difference is measured."""
    recipe = run.recipe
    if idle := recipe.given(*_UNUSED_BY_EXACT):
        run.progress.warn(
            f"{', '.join(idle)}: ignored by --profile {recipe.profile}, which fits no weights and needs no data"
        )
    decoder, header = inputs.checkpoint.require_decoder(), inputs.checkpoint.header
    stored = decoder.spec if header is None or header.decoder is None else header.decoder
    changes = exact_changes(stored, converted.spec)
    if not changes:
        raise SpecError(f"{inputs.checkpoint.location}: every layer has its fastest exact operator; nothing to change")
    num_latents, height, width = _EXACT_CHECK_GRID
    latents = seeded_latents(
        decoder.spec,
        (1 if converted.spec.still else num_latents, height, width),
        seed=recipe.seed,
        latent_mean=inputs.checkpoint.latent_mean or None,
        latent_std=inputs.checkpoint.latent_std or None,
    ).to(inputs.device)
    with torch.no_grad():
        difference = float((converted(latents) - decoder(latents)).abs().max()) / 2.0
    record = ConversionRecord(
        operators={address: after for address, _, after in changes},
        max_difference_of_range=difference,
        gflop_9x256x256_before=_gflop(decoder.spec),
        gflop_9x256x256_after=_gflop(converted.spec),
    )
    tables = (_exact_table(changes, difference),)
    return _written(run, inputs, converted, record, tables)


def _written(
    run: Run[ConvertOpsRecipe],
    inputs: Inputs,
    converted: Decoder,
    record: ConversionRecord,
    tables: tuple[TableData, ...],
    *,
    files: Sequence[Path] = (),
    speedup: float | None = None,
) -> StageOutcome:
    """Write the artifact."""
    header = run.header(inputs, record, files=files, speedup=speedup)
    encoder, dtype = inputs.checkpoint.own_encoder, DTYPES[run.recipe.dtype]
    save_checkpoint(run.output, header, decoder=converted, encoder=encoder, dtype=dtype, force=run.force)
    following = next_commands(run.recipe.output, header, None, data=run.recipe.data)
    return StageOutcome((run.output,), tables, record.as_json(), next_commands=following)


def _exact_table(changes: list[tuple[str, Operator, Operator]], difference: float) -> TableData:
    counts = Counter((stage_of(address), before, after) for address, before, after in changes)
    columns = (
        Column("stage", align="left"),
        Column("layers", "d"),
        Column("from", align="left"),
        Column("to", align="left"),
    )
    rows = tuple((stage, count, before, after) for (stage, before, after), count in counts.items())
    return TableData(f"Exact operators; frames differ by at most {difference:.1e} of their range", columns, rows)


def _gflop(spec: DecoderSpec) -> float:
    """Cost of decoding 9 frames of 256 x 256."""
    side = 256 // spec.spatial_factor
    return total_gflop(spec, (spec.num_latents(9), side, side))


def _operator_table(before: Decoder, after: Decoder) -> TableData:
    rows = []
    for old, new in zip(before.spec.stages, after.spec.stages, strict=True):
        if old != new:
            rows.append((old.name, _main_operator(before.spec, old.name), _main_operator(after.spec, old.name)))
    columns = (Column("stage", align="left"), Column("from", align="left"), Column("to", align="left"))
    title = f"Operators: {_gflop(before.spec):.1f} to {_gflop(after.spec):.1f} GFLOP for 9 frames of 256 x 256"
    return TableData(title, columns, tuple(rows))


def _main_operator(spec: DecoderSpec, stage: str) -> str:
    found = {
        layer.operator for address, layer in spec.layers() if address.startswith(f"{stage}.") and "conv" in address
    }
    found |= {f"time rank {layer.rank}" for address, layer in spec.layers() if layer.rank and address.startswith(stage)}
    return ", ".join(sorted(found))
