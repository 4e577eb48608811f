"""`--dry-run`: show what a command would make, read and write, and roughly how long it would take; write nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from math import prod
from pathlib import Path

import torch

from flashvaed_cli.decoders.predict.cost import Grid, total_gflop
from flashvaed_cli.decoders.predict.memory import predict_peak_bytes
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.errors import SpecError
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.families.registry import get_family, shallow_stages
from flashvaed_cli.paths import user_path
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.convert_ops import ConvertOpsRecipe
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.recipe.fields import ANALYSIS_FILE, DEFAULT_KEEP_RATIO
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.recipe.settings import CommandRecipe
from flashvaed_cli.report.tables import Cell, Column, TableData
from flashvaed_cli.stages.common.asked_names import require_known_operators, require_known_ratios, require_own_blocks
from flashvaed_cli.stages.common.clips import find_data
from flashvaed_cli.stages.common.fitted_clips import fitted_to_vae
from flashvaed_cli.stages.common.loading import Inputs, choose_device, choose_input, input_settings, load_inputs
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.distill.run import choose_phases
from flashvaed_cli.stages.distill.student import with_new_student
from flashvaed_cli.surgery.native import base_width_step, native_base_width, native_spec, nearest_base_width
from flashvaed_cli.surgery.respec import converted_spec, spec_of_widths, with_time_rank
from flashvaed_cli.surgery.selection import num_kept_channels

# In decodings of one clip by the eager original: measured on builtin:tiny-wan and on full-size Wan 2.1 with random
# weights; they hold within a factor of two.
_STATISTICS, _FIT_PER_LAYER, _END = 3.0, 0.2, 5.0
_WHOLE_FRAME = 256
"""Side assumed for whole frames, in pixels, if no crop is given."""


def preview_prune(recipe: PruneRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Widths, cost, time and memory of `prune`.

    Raises:
        SpecError: a ratio names nothing or keeps nothing, or `--target-*` is given, whose widths need measurements.
    """
    if recipe.has_target:
        raise SpecError("--dry-run: the widths of a --target follow from measurements; run it, or give --ratio")
    inputs, location = _load(recipe, progress)
    spec = inputs.checkpoint.require_decoder().spec
    require_known_ratios(recipe, spec)
    if recipe.layout == "native":
        full = native_base_width(spec)
        base = nearest_base_width(full, recipe.keep_ratio or DEFAULT_KEEP_RATIO, base_width_step(spec, recipe.round_to))
        after = native_spec(spec, base)
    else:
        ratios = recipe.ratios(shallow_stages(spec))
        asked = {one.name: ratios.get(one.name, ratios.get(one.stage, 1.0)) for one in channel_groups(spec)}
        widths = {
            one.name: num_kept_channels(one.width, asked[one.name], math.lcm(recipe.round_to, one.run))
            for one in channel_groups(spec)
        }
        after = spec_of_widths(spec, widths)
    analysis = [ANALYSIS_FILE] if recipe.analysis is None and Path(ANALYSIS_FILE).exists() else []
    reads = [location, *([recipe.analysis] if recipe.analysis else analysis)]
    return _fitting_outcome(recipe, inputs, after, reads, progress, statistics=not (recipe.analysis or analysis))


def preview_convert_ops(
    recipe: ConvertOpsRecipe, *, progress: Progress, force: bool, command_line: str
) -> StageOutcome:
    """Operators, cost, time and memory of `convert-ops`."""
    inputs, location = _load(recipe, progress)
    decoder = inputs.checkpoint.require_decoder()
    if recipe.profile != "paper":
        after = (exact_decoder if recipe.profile == "exact" else still_decoder)(decoder).spec
        rows = _costs(decoder.spec, after, (3, 32, 32))
        return _outcome([*rows, ("estimated time", "seconds")], [location], [recipe.output], {})
    require_own_blocks(decoder.spec, location)
    require_known_operators(recipe, decoder.spec)
    after = converted_spec(decoder.spec, {**get_family(inputs.checkpoint.family).paper_operators, **recipe.operators})
    if recipe.time_rank is not None:
        after = with_time_rank(after, recipe.time_rank)
    return _fitting_outcome(recipe, inputs, after, [location], progress, statistics=False)


def preview_distill(recipe: DistillRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Phases, time and memory of `distill`."""
    inputs, location = _load(recipe, progress)
    inputs = with_new_student(recipe, inputs, progress)
    student = inputs.checkpoint.require_decoder()
    phases = choose_phases(recipe, inputs, progress)
    recipe = fitted_to_vae(recipe, inputs.original, progress, still=student.spec.still)
    grid = _grid(recipe.num_frames, recipe.crop_size, student.spec)
    teacher_s = _decode_s(inputs, grid, recipe.batch_size)
    share = total_gflop(student.spec, grid) / total_gflop(inputs.reference().spec, grid)
    num_steps = sum(phase.num_steps for phase in phases)
    step_s = recipe.gradient_accumulation * teacher_s * (1 + 3 * share)  # forward of both, backward twice the forward
    rows: list[tuple[Cell, ...]] = [
        ("phases", ", ".join(f"{phase.phase} ({phase.num_steps} steps)" for phase in phases)),
        ("million parameters to train", f"{student.parameter_count / 1e6:.3f}"),
        (
            "estimated time",
            f"{_shown(step_s * num_steps)} ({step_s:.2g} s a step; encoding {recipe.num_clips} clips first)",
        ),
    ]
    base = user_path(recipe.output)
    writes = [recipe.output, str(base.with_suffix(".log.jsonl")), str(base.with_suffix(".losses.png"))]
    figures = {"seconds": step_s * num_steps, "num_steps": num_steps}
    return _outcome(rows, [location, *_data(recipe)], writes, figures)


def _load(recipe: PruneRecipe | ConvertOpsRecipe | DistillRecipe, progress: Progress) -> tuple[Inputs, str]:
    location = choose_input(recipe.input, type(recipe), progress)
    device = choose_device(recipe.device)
    return load_inputs(location, **input_settings(recipe), device=device, progress=progress), location


def _fitting_outcome(
    recipe: PruneRecipe | ConvertOpsRecipe,
    inputs: Inputs,
    after: DecoderSpec,
    reads: Sequence[str],
    progress: Progress,
    *,
    statistics: bool,
) -> StageOutcome:
    before = inputs.checkpoint.require_decoder().spec
    fitted = fitted_to_vae(recipe, inputs.original, progress, still=before.still)
    grid = _grid(fitted.num_frames, fitted.crop_size, before)
    known = dict(before.layers())
    changed = [(address, layer) for address, layer in after.layers() if known.get(address) != layer]
    decodings = _END + recipe.num_calibration_clips * (
        _STATISTICS * statistics + (_FIT_PER_LAYER * len(changed) if recipe.reconstruct != "none" else 0)
    )
    seconds = decodings * _decode_s(inputs, grid, 1)
    gram = max((layer.in_width * prod(layer.kernel) + 1) ** 2 * 8 for _, layer in changed) if changed else 0
    memory = 2 * predict_peak_bytes(before, grid, channels_last=False) + 3 * gram
    rows = [
        *_costs(before, after, grid),
        ("layers to fit", str(len(changed) if recipe.reconstruct != "none" else 0)),
        ("estimated time", f"{_shown(seconds)} (within a factor of two)"),
        ("estimated memory beside the weights", f"{memory / 1e6:,.0f} MB"),
    ]
    figures = {"seconds": seconds, "memory_bytes": memory, "widths": _widths(after)}
    return _outcome(rows, [*reads, *_data(recipe)], [recipe.output], figures)


def _costs(before: DecoderSpec, after: DecoderSpec, grid: Grid) -> list[tuple[Cell, ...]]:
    widths = _widths(after)
    old = {group.name: group.width for group in channel_groups(before)}
    narrowed = [f"{name} {old[name]} to {width}" for name, width in widths.items() if old.get(name, width) != width]
    parameters = [sum(layer.parameter_count for _, layer in spec.layers()) for spec in (before, after)]
    gflops = [total_gflop(spec, grid) for spec in (before, after)]
    rows: list[tuple[Cell, ...]] = [("channels", "; ".join(narrowed))] if narrowed else []
    rows += [
        ("million parameters in its layers", " to ".join(f"{count / 1e6:.3f}" for count in parameters)),
        ("GFLOP for such a clip", " to ".join(f"{gflop:.1f}" for gflop in gflops)),
        ("predicted speed-up, by operations", f"{gflops[0] / gflops[1]:.1f}"),
    ]
    return rows


def _widths(spec: DecoderSpec) -> dict[str, int]:
    return {group.name: group.width for group in channel_groups(spec)}


def _grid(num_frames: int, crop_size: int | None, spec: DecoderSpec) -> Grid:
    side = (crop_size or _WHOLE_FRAME) // spec.spatial_factor
    return (1 if spec.still else spec.num_latents(num_frames), side, side)


@torch.no_grad()
def _decode_s(inputs: Inputs, grid: Grid, batch: int) -> float:
    """One decoding by the eager original, after a short one that warms up."""
    decoder = inputs.reference()
    for size in ((1, *grid[1:]), grid):
        latents = seeded_latents(decoder.spec, size, seed=0, batch=batch).to(inputs.device)
        start = time.perf_counter()
        float(decoder(latents).sum())  # waits for the device
        seconds = time.perf_counter() - start
    return seconds


def _data(recipe: CommandRecipe) -> list[str]:
    places = getattr(recipe, "data", ())
    found = find_data(places)  # raises for missing files
    return [*places] or [f"{len(found)} clips that ship with the program"]


def _outcome(
    rows: Sequence[tuple[Cell, ...]], reads: Sequence[str], writes: Sequence[str], figures: dict[str, object]
) -> StageOutcome:
    shown = [*rows, ("would read", ", ".join(reads)), ("would write", ", ".join(writes))]
    table = TableData("Dry run: nothing is written", (Column("", align="left"), Column("", align="left")), tuple(shown))
    document = {**figures, **{str(row[0]).replace(" ", "_"): row[1] for row in shown}}
    return StageOutcome((), (table,), {"kind": "flashvaed-dry-run", **document}, is_new=False)


def _shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else str(timedelta(minutes=round(seconds / 60)))[:-3] + " h:mm"
