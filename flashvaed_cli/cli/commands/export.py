"""`flashvaed export`."""

from __future__ import annotations

from typing import Annotated

import typer

from flashvaed_cli.cli.options import (
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
)
from flashvaed_cli.cli.running import resolve_settings, run_stage
from flashvaed_cli.errors import ExportError
from flashvaed_cli.recipe import ExportRecipe

EPILOG = """Examples:

flashvaed export

flashvaed export flash.safetensors --target onnx --opset 20 --output deploy/

flashvaed export flash.safetensors --target comfyui --dtype float16"""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("export", epilog=EPILOG)(export)


def export(
    context: typer.Context,
    input: Annotated[str | None, input_argument(ExportRecipe)] = None,
    targets: Annotated[
        list[str] | None,
        flag(ExportRecipe, "targets", "--target", "-t", metavar="safetensors|diffusers|onnx|..."),
    ] = None,
    opset: Annotated[int | None, flag(ExportRecipe, "opset")] = None,
    output: Annotated[str | None, flag(ExportRecipe, "output", "--output", "-o")] = None,
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
    """Write a decoder for other programs, each format checked against this one's output.

    Reads a decoder; writes a folder with the chosen formats. Where one fails the others are written, and the exit
    code is 2.
    """
    settings = resolve_settings(context, ExportRecipe)
    from flashvaed_cli.stages.export.run import run_export

    failed = run_stage(context, run_export, settings).as_dict().get("failed")
    if isinstance(failed, list) and failed:
        reasons = [str(entry["reason"]) for entry in failed]
        raise ExportError("\n".join(["not every format could be written; the others are there:", *reasons]))
