"""`flashvaed info`."""

from __future__ import annotations

from typing import Annotated

import typer

from flashvaed_cli.cli.options import (
    AllowDownloadOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    WeightsOption,
    flag,
)
from flashvaed_cli.cli.running import USING_PANEL, resolve_settings, run_stage
from flashvaed_cli.recipe import InfoRecipe

EPILOG = """Examples:

flashvaed info flash.safetensors

flashvaed info Wan2.1_VAE.pth --size 81x480x832

flashvaed info pruned.safetensors flash.safetensors

flashvaed info flash.safetensors --json | jq '.files[0].decoder.gflop'"""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("info", epilog=EPILOG, rich_help_panel=USING_PANEL)(info)


def info(
    context: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE...",
            help=f"{InfoRecipe.model_fields['files'].description} Default: the first that exists of "
            f"{', '.join(InfoRecipe.default_inputs)}.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[str | None, flag(InfoRecipe, "size", metavar="FRAMESxHEIGHTxWIDTH")] = None,
    family: FamilyOption = None,
    weights: WeightsOption = None,
    allow_download: AllowDownloadOption = None,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Tell what a file is, where it came from, what was measured of it, and what to do next.

    Reads artifacts and checkpoints of other programs; with several files, shows what differs. Writes nothing.
    """
    from flashvaed_cli.stages.info.run import run_info

    run_stage(context, run_info, resolve_settings(context, InfoRecipe))
