"""`flashvaed convert-ops`."""

from __future__ import annotations

from typing import Annotated

import typer

from flashvaed_cli.cli.options import (
    DATA_SETTINGS,
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
    keyed_overrides,
)
from flashvaed_cli.cli.running import resolve_settings, run_stage
from flashvaed_cli.recipe import ConvertOpsRecipe
from flashvaed_cli.recipe.fields import LatentScale, OperatorProfile, ReconstructMode

EPILOG = """Examples:

flashvaed convert-ops

flashvaed convert-ops pruned.safetensors --operator up2=frame2d --operator mid=causal3d

flashvaed convert-ops Wan2.1_VAE.pth --data clips/ --output converted.safetensors

flashvaed convert-ops --time-rank 0.25

flashvaed convert-ops Wan2.1_VAE.pth --profile exact --output exact.safetensors

flashvaed convert-ops qwen_image_vae.safetensors --family qwen-image --profile image --output images.safetensors"""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("convert-ops", epilog=EPILOG)(convert_ops)


def convert_ops(
    context: typer.Context,
    input: Annotated[str | None, input_argument(ConvertOpsRecipe)] = None,
    profile: Annotated[OperatorProfile | None, flag(ConvertOpsRecipe, "profile")] = None,
    operator: Annotated[
        list[str] | None, flag(ConvertOpsRecipe, "operators", "--operator", metavar="STAGE=OPERATOR")
    ] = None,
    time_rank: Annotated[float | None, flag(ConvertOpsRecipe, "time_rank")] = None,
    original: Annotated[str | None, flag(ConvertOpsRecipe, "original")] = None,
    reconstruct: Annotated[ReconstructMode | None, flag(ConvertOpsRecipe, "reconstruct")] = None,
    dampening_frac: Annotated[float | None, flag(ConvertOpsRecipe, "dampening_frac")] = None,
    num_separable_iterations: Annotated[int | None, flag(ConvertOpsRecipe, "num_separable_iterations")] = None,
    data: Annotated[list[str] | None, flag(ConvertOpsRecipe, "data", "--data", "-d", **DATA_SETTINGS)] = None,
    latent_scale: Annotated[LatentScale | None, flag(ConvertOpsRecipe, "latent_scale")] = None,
    num_calibration_clips: Annotated[int | None, flag(ConvertOpsRecipe, "num_calibration_clips")] = None,
    num_frames: Annotated[int | None, flag(ConvertOpsRecipe, "num_frames")] = None,
    crop_size: Annotated[int | None, flag(ConvertOpsRecipe, "crop_size")] = None,
    max_side: Annotated[int | None, flag(ConvertOpsRecipe, "max_side")] = None,
    output: Annotated[str | None, flag(ConvertOpsRecipe, "output", "--output", "-o")] = None,
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
    """Give every stage the cheapest operator that it can bear, and solve the new kernels by least squares.

    Reads a decoder and clips; writes converted.safetensors. Operators: causal3d, dwsep3d, frame2d.
    """
    operators = keyed_overrides("--operator", operator, str)
    settings = resolve_settings(context, ConvertOpsRecipe, {"operators": operators} if operators else None)
    if dry_run:
        from flashvaed_cli.stages.dry_run import preview_convert_ops

        run_stage(context, preview_convert_ops, settings)
        return
    from flashvaed_cli.stages.convert_ops import run_convert_ops

    run_stage(context, run_convert_ops, settings)
