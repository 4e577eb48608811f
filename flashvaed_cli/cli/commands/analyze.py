"""`flashvaed analyze`."""

from __future__ import annotations

from typing import Annotated

import typer

from flashvaed_cli.cli.options import (
    DATA_SETTINGS,
    AllowDownloadOption,
    DeviceOption,
    DTypeOption,
    FamilyOption,
    ForceOption,
    JsonOption,
    QuietOption,
    RecipeOption,
    SeedOption,
    StepOption,
    WeightsOption,
    flag,
    input_argument,
    switch,
)
from flashvaed_cli.cli.running import resolve_settings, run_stage
from flashvaed_cli.recipe import AnalyzeRecipe
from flashvaed_cli.recipe.fields import LatentScale, SelectionRule

EPILOG = """Examples:

flashvaed analyze

flashvaed analyze Wan2.1_VAE.pth --data clips/ --num-calibration-clips 16

flashvaed analyze --plots --output build/analysis.safetensors"""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("analyze", epilog=EPILOG)(analyze)


def analyze(
    context: typer.Context,
    input: Annotated[str | None, input_argument(AnalyzeRecipe)] = None,
    data: Annotated[list[str] | None, flag(AnalyzeRecipe, "data", "--data", "-d", **DATA_SETTINGS)] = None,
    latent_scale: Annotated[LatentScale | None, flag(AnalyzeRecipe, "latent_scale")] = None,
    output: Annotated[str | None, flag(AnalyzeRecipe, "output", "--output", "-o")] = None,
    num_calibration_clips: Annotated[int | None, flag(AnalyzeRecipe, "num_calibration_clips")] = None,
    num_frames: Annotated[int | None, flag(AnalyzeRecipe, "num_frames")] = None,
    crop_size: Annotated[int | None, flag(AnalyzeRecipe, "crop_size")] = None,
    max_side: Annotated[int | None, flag(AnalyzeRecipe, "max_side")] = None,
    latency_frames: Annotated[int | None, flag(AnalyzeRecipe, "latency_frames")] = None,
    latency_side: Annotated[int | None, flag(AnalyzeRecipe, "latency_side")] = None,
    num_latency_rounds: Annotated[int | None, flag(AnalyzeRecipe, "num_latency_rounds")] = None,
    width_latency_s: Annotated[int | None, flag(AnalyzeRecipe, "width_latency_s")] = None,
    original: Annotated[str | None, flag(AnalyzeRecipe, "original")] = None,
    rule: Annotated[SelectionRule | None, flag(AnalyzeRecipe, "rule")] = None,
    plots: Annotated[bool | None, switch(AnalyzeRecipe, "plots")] = None,
    recipe: RecipeOption = None,
    step: StepOption = None,
    family: FamilyOption = None,
    weights: WeightsOption = None,
    allow_download: AllowDownloadOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    seed: SeedOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Measure a decoder stage by stage: size, latency, and how many of its channels are independent.

    Reads a VAE and clips; writes analysis.safetensors, which prune uses.
    """
    settings = resolve_settings(context, AnalyzeRecipe)
    from flashvaed_cli.stages.analyze import run_analyze

    run_stage(context, run_analyze, settings)
