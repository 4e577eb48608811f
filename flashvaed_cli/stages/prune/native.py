"""`prune --layout native`: choose the widths nearest to the request that a stock class can build."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flashvaed_cli.artifact.measured import WidthTimes
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import Kept
from flashvaed_cli.errors import SpecError
from flashvaed_cli.metrics.speed import speed_ratio
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.progress import Progress, SilentProgress
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.recipe.settings import DEFAULT_KEEP_RATIO
from flashvaed_cli.stages.latency_model import TimedClip
from flashvaed_cli.stages.prune.budget import Budget, target_clip, times_of
from flashvaed_cli.surgery.native import (
    base_width_step,
    largest_base_width_within,
    native_base_width,
    native_spec,
    nearest_base_width,
    select_native,
)
from flashvaed_cli.surgery.selection import GroupSelection

_NUM_ROUNDS = 3


def choose_native(
    recipe: PruneRecipe,
    decoder: Decoder,
    statistics: Mapping[str, TensorStatistics],
    stored: WidthTimes | None,
    device: torch.device,
    progress: Progress,
) -> tuple[Budget | None, DecoderSpec, Kept, list[GroupSelection]]:
    """The spec of the narrower original, and its kept channels; rounding a ratio to a base width is warned of.

    A target speed-up is reached by timing: bisection finds the widest decoder that is fast enough.

    Args:
        stored: the latency model of the analysis, if it has one.
    Raises:
        SpecError: the family or the decoder cannot be native, or the ratio keeps all.
    """
    full, budget, asked = native_base_width(decoder.spec), None, None
    step = base_width_step(decoder.spec, recipe.round_to)
    if recipe.has_target:
        budget = Budget(None, target_clip(recipe, decoder.spec, stored, device, progress))
    if budget is not None and recipe.target_gflops is not None:
        grid = budget.clip.grid(decoder.spec)
        base = largest_base_width_within(
            decoder.spec, full, step, recipe.target_gflops, lambda spec: total_gflop(spec, grid)
        )
    elif budget is not None and recipe.target_speedup is not None:
        base = fast_enough(decoder, full, budget.clip, recipe, progress)
    else:
        asked = DEFAULT_KEEP_RATIO if recipe.keep_ratio is None else recipe.keep_ratio
        base = nearest_base_width(full, asked, step)
    if base == full:
        raise SpecError(f"nothing to prune: the base width stays {full}. Give a smaller ratio, target or --round-to")
    if asked is not None and abs(base - full * asked) > 1e-9:
        progress.warn(
            f"ratio {asked:g} of base width {full} is not a native width: taking {base}, the nearest one, a ratio of "
            f"{base / full:.4g}"
        )
    progress.log(f"native layout: base width {full} to {base}, in the whole decoder")
    spec = native_spec(decoder.spec, base)
    return budget, spec, *select_native(decoder, statistics, spec, rule=recipe.rule, seed=recipe.seed)


@torch.no_grad()
def fast_enough(decoder: Decoder, full: int, clip: TimedClip, recipe: PruneRecipe, progress: Progress) -> int:
    """The widest base width at which a decoder with random weights reaches the target speed-up.

    Raises:
        SpecError: not even the narrowest does.
    """
    assert recipe.target_speedup is not None
    step = base_width_step(decoder.spec, recipe.round_to)
    widths = list(range(step, full + 1, step)) or [full]
    low, high, best = 0, len(widths) - 1, 0.0
    found: int | None = None
    while low <= high:
        middle = (low + high) // 2
        candidate = Decoder(native_spec(decoder.spec, widths[middle])).to(clip.device).eval().requires_grad_(False)
        times = times_of(decoder, candidate, clip, recipe.seed, _NUM_ROUNDS, SilentProgress())
        speedup = speed_ratio(times["before"], times["after"]).median
        progress.log(f"base width {widths[middle]}: {speedup:.2f} times as fast")
        best = max(best, speedup)
        if speedup >= recipe.target_speedup:
            found, low = widths[middle], middle + 1
        else:
            high = middle - 1
    if found is None:
        raise SpecError(
            f"--target-speedup {recipe.target_speedup:g}: the fastest native decoder measured is {best:.2f} times as "
            "fast. Ask for less, or leave --layout native out"
        )
    return found
