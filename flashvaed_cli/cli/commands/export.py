"""`flashvaed export`."""

from __future__ import annotations

import typer

from flashvaed_cli.cli.running import run_stage
from flashvaed_cli.cli.signature import Command
from flashvaed_cli.errors import ExportError
from flashvaed_cli.recipe import ExportRecipe


def export(context: typer.Context, settings: ExportRecipe) -> None:
    """Write a decoder for other programs, each format checked against this one's output.

    Reads a decoder; writes a folder with the chosen formats. Where one fails the others are written, and the exit
    code is 2.
    """
    from flashvaed_cli.stages.export.run import run_export

    failed = run_stage(context, run_export, settings).as_dict().get("failed")
    if isinstance(failed, list) and failed:
        reasons = [str(entry["reason"]) for entry in failed]
        raise ExportError("\n".join(["not every format could be written; the others are there:", *reasons]))


COMMAND = Command(
    recipe=ExportRecipe,
    run=export,
    options=("targets", "opset", "original", "output"),
    examples=(
        "flashvaed export",
        "flashvaed export flash.safetensors --target onnx --opset 20 --output deploy/",
        "flashvaed export flash.safetensors --target comfyui --dtype float16",
    ),
)
