"""`flashvaed eval --speed`: the original and derived decoders on the same random latents, timed in alternation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.errors import DecodeError
from flashvaed_cli.metrics.autotune import device_name
from flashvaed_cli.printable import counted
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.recipe.quantities import parse_memory, parse_size
from flashvaed_cli.report.pipeline import PipelineShare
from flashvaed_cli.report.speed import (
    SPEED_JSON,
    SpeedReport,
    SpeedTable,
    all_notes,
    save_speed,
    speed_document,
    speed_tables,
)
from flashvaed_cli.stages.common.compared import derived_decoders
from flashvaed_cli.stages.common.loading import DTYPES
from flashvaed_cli.stages.common.outputs import filled_at_the_end, moved
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.common.run import Run
from flashvaed_cli.stages.speed.table import RESERVED_NAMES, SpeedSettings, TimedSize, baseline_of, time_decoders

_DEFAULT_FRAMES = 9
_UNUSED = ("data", "latent_scale", "num_clips", "num_frames", "max_side", "video", "lpips")


def run_speed(recipe: EvalRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Time the decoders at every size and length of the recipe; write speed.json and speed.md.

    Raises:
        ArtifactError: decoder or original cannot be loaded.
        DecodeError: several frames for a decoder of single images; to be compiled, and this machine has no compiler;
            or no decoder fits the memory at any size.
        FlashVaedError: the output folder holds files of something else.
    """
    run = Run.open_folder(recipe, SPEED_JSON, "report.json", progress=progress, force=force, command_line=command_line)
    output, inputs = run.output, run.load()
    device = inputs.device
    original, derived = inputs.original.require_decoder(), derived_decoders(inputs, recipe, taken=RESERVED_NAMES)
    lengths = _lengths(recipe, {inputs.original.location: original, **derived})
    if recipe.compile:
        DecodeRuntime(original, DecodeSettings(compile=True))  # raises at once if there is no compiler
    tables, notes = [], []
    misfits: list[DecodeError] = []
    if idle := recipe.given(*_UNUSED):
        progress.warn(f"{', '.join(idle)}: ignored with --speed, which decodes random latents and judges no clip")
    for height, width in map(parse_size, recipe.sizes):
        for num_frames in lengths:
            size = _whole(TimedSize(num_frames, height, width), original, progress)
            try:
                table, remarks = time_decoders(original, derived, size, _settings(recipe), device, progress=progress)
            except DecodeError as error:
                misfits.append(error)
                continue
            tables.append(_in_pipeline(table, recipe.pipeline_seconds))
            notes += remarks
    if not tables:
        raise misfits[0]
    notes += [str(error) for error in misfits]
    settings = {
        "command": command_line,
        "decoder": inputs.checkpoint.location,
        "original": inputs.original.location,
        "device": device_with_threads(device),
        "torch": torch.__version__,
        "dtype": recipe.dtype,
        "rounds": recipe.num_speed_rounds,
    }
    report = SpeedReport(tuple(tables), settings, tuple(dict.fromkeys(notes)))
    with filled_at_the_end(output, SPEED_JSON, force=force) as draft:
        written = save_speed(report, draft)
    figures = {"speed": str(output / SPEED_JSON), "tables": speed_document(report)["tables"]}
    paths = moved((written["markdown"], written["json"]), output)
    return StageOutcome(paths, speed_tables(report), figures, all_notes(report))


def _lengths(recipe: EvalRecipe, decoders: Mapping[str, Decoder]) -> tuple[int, ...]:
    """Numbers of frames to time: those asked for, or one that suits all decoders.

    Raises:
        DecodeError: several frames are asked for, and one of the decoders takes single images.
    """
    stills = [name for name, decoder in decoders.items() if decoder.spec.still]
    if recipe.frames is None:
        return (1 if stills else _DEFAULT_FRAMES,)
    if stills and (several := [num_frames for num_frames in recipe.frames if num_frames > 1]):
        listed = ",".join(map(str, several))
        raise DecodeError(f"--frames {listed}: {stills[0]} decodes single images; give --frames 1, or leave it out")
    return recipe.frames


def device_with_threads(device: torch.device) -> str:
    """Name, and on the CPU the number of threads."""
    name = device_name(device)
    return f"{name}, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else name


def _whole(asked: TimedSize, original: Decoder, progress: Progress) -> TimedSize:
    size = asked.rounded(original.spec)
    if size != asked:
        progress.warn(f"{asked} are timed as {size}: what whole latents decode to")
    progress.log(f"timing {size}")
    return size


def _in_pipeline(table: SpeedTable, rest_s: float | None) -> SpeedTable:
    """The table with the effect of each decoder on a pipeline whose other steps take `rest_s`."""
    baseline = baseline_of(table.rows)
    eager = None if baseline is None else baseline.seconds
    if rest_s is None or eager is None:
        return table
    shares = [one.seconds and PipelineShare(rest_s, one.seconds.median, eager.median) for one in table.rows]
    rows = tuple(replace(row, pipeline=share) for row, share in zip(table.rows, shares, strict=True))
    return replace(table, rows=rows)


def _settings(recipe: EvalRecipe) -> SpeedSettings:
    return SpeedSettings(
        dtype=DTYPES[recipe.dtype],
        num_rounds=recipe.num_speed_rounds,
        budget_s=recipe.speed_budget if recipe.given("speed_budget") else None,
        chunk=recipe.chunk,
        tile=recipe.tile,
        max_memory_bytes=None if recipe.max_memory is None else parse_memory(recipe.max_memory),
        compile=recipe.compile,
        autotune=recipe.autotune,
        seed=recipe.seed,
    )
