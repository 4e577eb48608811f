"""`flashvaed prune`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from flashvaed_cli.cli.flags import Overrides
from flashvaed_cli.cli.running import run_stage
from flashvaed_cli.cli.signature import CALIBRATION_CLIPS, PREVIEWED_SWITCHES, Command
from flashvaed_cli.recipe import PruneRecipe


def prune(context: typer.Context, settings: PruneRecipe) -> None:
    """Keep the most independent channels of the shallow stages, and refit the weights around them.

    Reads a decoder, its analysis and clips; writes pruned.safetensors. A ratio is the fraction KEPT.
    """
    from flashvaed_cli.stages.dry_run import preview_prune
    from flashvaed_cli.stages.prune.run import run_prune

    run_stage(context, preview_prune if context.params["dry_run"] else run_prune, settings)


def _target_replaces_ratios(given: Mapping[str, Any]) -> Overrides:
    """A target that was given as a flag stands in place of the recipe's ratios."""
    if given["target_speedup"] is None and given["target_gflops"] is None:
        return {}
    return {"keep_ratio": None, "stage_keep_ratios": {}, "group_keep_ratios": {}}


COMMAND = Command(
    recipe=PruneRecipe,
    run=prune,
    options=("keep_ratio", "rule", "layout", "with_encoder", "round_to", "analysis", "original", "output"),
    panels={
        "A target in place of ratios": ("target_speedup", "target_gflops", "latency_frames", "latency_side"),
        "New weights": ("reconstruct", "dampening_frac"),
        "Clips": CALIBRATION_CLIPS,
    },
    switches=(*PREVIEWED_SWITCHES, "verbose"),
    amend=_target_replaces_ratios,
    examples=(
        "flashvaed prune --ratio 0.25",
        "flashvaed prune Wan2.1_VAE.pth --ratio up2=0.125 --ratio up3=0.125 --round-to 8 --data clips/",
        "flashvaed prune --ratio 0.5 --ratio up3.stream=0.25 --rule next-layer",
        "flashvaed prune --target-speedup 1.5",
        "flashvaed prune --layout native --ratio 0.5",
        "flashvaed prune --recipe paper",
    ),
)
