"""`flashvaed prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from flashvaed_cli.cli.options import (
    DATA_SETTINGS,
    NO_RATIOS,
    RATIO_SETTINGS,
    AllowDownloadOption,
    DeviceOption,
    DryRunOption,
    DTypeOption,
    FamilyOption,
    ForceOption,
    JsonOption,
    QuietOption,
    RecipeOption,
    SeedOption,
    StepOption,
    VerboseOption,
    WeightsOption,
    flag,
    input_argument,
    ratio_overrides,
    switch,
)
from flashvaed_cli.cli.running import resolve_settings, run_stage
from flashvaed_cli.recipe import PruneRecipe
from flashvaed_cli.recipe.fields import LatentScale, ReconstructMode, SelectionRule, StudentLayout

EPILOG = """Examples:

flashvaed prune --ratio 0.25

flashvaed prune Wan2.1_VAE.pth --ratio up2=0.125 --ratio up3=0.125 --round-to 8 --data clips/

flashvaed prune --ratio 0.5 --ratio up3.stream=0.25 --rule next-layer

flashvaed prune --target-speedup 1.5

flashvaed prune --layout native --ratio 0.5

flashvaed prune --recipe paper"""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("prune", epilog=EPILOG)(prune)


def prune(
    context: typer.Context,
    input: Annotated[str | None, input_argument(PruneRecipe)] = None,
    ratio: Annotated[list[str] | None, flag(PruneRecipe, "keep_ratio", "--ratio", "-r", **RATIO_SETTINGS)] = None,
    analysis: Annotated[str | None, flag(PruneRecipe, "analysis")] = None,
    original: Annotated[str | None, flag(PruneRecipe, "original")] = None,
    rule: Annotated[SelectionRule | None, flag(PruneRecipe, "rule")] = None,
    layout: Annotated[StudentLayout | None, flag(PruneRecipe, "layout")] = None,
    with_encoder: Annotated[bool | None, switch(PruneRecipe, "with_encoder")] = None,
    round_to: Annotated[int | None, flag(PruneRecipe, "round_to")] = None,
    target_speedup: Annotated[float | None, flag(PruneRecipe, "target_speedup")] = None,
    target_gflops: Annotated[float | None, flag(PruneRecipe, "target_gflops")] = None,
    latency_frames: Annotated[int | None, flag(PruneRecipe, "latency_frames")] = None,
    latency_side: Annotated[int | None, flag(PruneRecipe, "latency_side")] = None,
    reconstruct: Annotated[ReconstructMode | None, flag(PruneRecipe, "reconstruct")] = None,
    dampening_frac: Annotated[float | None, flag(PruneRecipe, "dampening_frac")] = None,
    data: Annotated[list[str] | None, flag(PruneRecipe, "data", "--data", "-d", **DATA_SETTINGS)] = None,
    latent_scale: Annotated[LatentScale | None, flag(PruneRecipe, "latent_scale")] = None,
    num_calibration_clips: Annotated[int | None, flag(PruneRecipe, "num_calibration_clips")] = None,
    num_frames: Annotated[int | None, flag(PruneRecipe, "num_frames")] = None,
    crop_size: Annotated[int | None, flag(PruneRecipe, "crop_size")] = None,
    max_side: Annotated[int | None, flag(PruneRecipe, "max_side")] = None,
    output: Annotated[str | None, flag(PruneRecipe, "output", "--output", "-o")] = None,
    recipe: RecipeOption = None,
    step: StepOption = None,
    family: FamilyOption = None,
    weights: WeightsOption = None,
    allow_download: AllowDownloadOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    json_output: JsonOption = False,
) -> None:
    """Keep the most independent channels of the shallow stages, and solve the weights around them anew.

    Reads a decoder, its analysis and clips; writes pruned.safetensors. A ratio is the fraction KEPT.
    """
    has_target = target_speedup is not None or target_gflops is not None
    settings = resolve_settings(context, PruneRecipe, {**(NO_RATIOS if has_target else {}), **ratio_overrides(ratio)})
    if dry_run:
        from flashvaed_cli.stages.dry_run import preview_prune

        run_stage(context, preview_prune, settings)
        return
    from flashvaed_cli.stages.prune.run import run_prune

    run_stage(context, run_prune, settings)
