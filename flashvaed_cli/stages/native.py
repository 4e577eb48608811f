"""`prune --layout native`: the widths that a stock class can build, nearest to what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.cost import total_gflop
from flashvaed_cli.decoders.groups import Kept
from flashvaed_cli.decoders.spec import DecoderSpec
from flashvaed_cli.errors import SpecError
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.recipe.settings import DEFAULT_KEEP_RATIO
from flashvaed_cli.stages.budget import target_clip
from flashvaed_cli.surgery.native import (
    largest_base_width_within,
    native_base_width,
    native_spec,
    nearest_base_width,
    select_native,
)
from flashvaed_cli.surgery.selection import GroupSelection


def choose_native(
    recipe: PruneRecipe,
    decoder: Decoder,
    statistics: Mapping[str, TensorStatistics],
    stored: Mapping[str, Any] | None,
    device: torch.device,
    progress: Progress,
) -> tuple[DecoderSpec, Kept, list[GroupSelection]]:
    """The narrower original, and the channels that are left; a ratio between two base widths is rounded, and said.

    Args:
        stored: the latency model of the analysis, if it has one.
    Raises:
        SpecError: the family or the decoder cannot be native, or the ratio keeps all.
    """
    full = native_base_width(decoder.spec)
    if recipe.target_gflops is not None:
        clip = target_clip(recipe, decoder.spec, stored, device, progress)
        grid = clip.grid(decoder.spec)
        base = largest_base_width_within(
            decoder.spec, full, recipe.round_to, recipe.target_gflops, lambda spec: total_gflop(spec, grid)
        )
        asked = None
    else:
        asked = DEFAULT_KEEP_RATIO if recipe.keep_ratio is None else recipe.keep_ratio
        base = nearest_base_width(full, asked, recipe.round_to)
    if base == full:
        raise SpecError(f"nothing to prune: the base width stays {full}. Give a smaller ratio, target or --round-to")
    if asked is not None and abs(base - full * asked) > 1e-9:
        progress.warn(
            f"ratio {asked:g} of base width {full} is no whole width: {base} is the nearest native one, a ratio of "
            f"{base / full:.4g}"
        )
    progress.log(f"native layout: base width {full} to {base}, in the whole decoder")
    spec = native_spec(decoder.spec, base)
    return spec, *select_native(decoder, statistics, spec, rule=recipe.rule, seed=recipe.seed)
