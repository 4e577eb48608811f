"""`flashvaed eval`."""

from __future__ import annotations

from typing import Annotated, Literal

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
from flashvaed_cli.errors import GateFailed
from flashvaed_cli.recipe import EvalRecipe
from flashvaed_cli.recipe.fields import LatentScale

SPEED_PANEL = {"rich_help_panel": "Speed"}
FEATURES_PANEL = {"rich_help_panel": "Fréchet distance"}
GATES_PANEL = {"rich_help_panel": "Conditions"}
EPILOG = """Examples:

flashvaed eval

flashvaed eval flash.safetensors --data holiday.mp4 --max-side 480 --output report-holiday

flashvaed eval --lpips on --no-video --json

flashvaed eval --require "psnr_retention>=0.969" --require "speedup>=4" --junit eval.xml

flashvaed eval --protocol davis --data DAVIS/ --features i3d_torchscript.pt

flashvaed eval --speed --frames 9,81 --sizes 256x256,480p --dtype bfloat16

flashvaed eval flash.safetensors --speed --sizes 1080p --frames 17 --max-memory 4GB --compile

flashvaed eval --speed --autotune --sizes 480p"""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("eval", epilog=EPILOG)(evaluate)


def evaluate(
    context: typer.Context,
    input: Annotated[str | None, input_argument(EvalRecipe)] = None,
    data: Annotated[list[str] | None, flag(EvalRecipe, "data", "--data", "-d", **DATA_SETTINGS)] = None,
    latent_scale: Annotated[LatentScale | None, flag(EvalRecipe, "latent_scale")] = None,
    original: Annotated[str | None, flag(EvalRecipe, "original")] = None,
    compare: Annotated[list[str] | None, flag(EvalRecipe, "compare", "--compare", "-c")] = None,
    output: Annotated[str | None, flag(EvalRecipe, "output", "--output", "-o")] = None,
    num_clips: Annotated[int | None, flag(EvalRecipe, "num_clips", default="all")] = None,
    num_frames: Annotated[int | None, flag(EvalRecipe, "num_frames", default="all")] = None,
    max_side: Annotated[int | None, flag(EvalRecipe, "max_side")] = None,
    chunk: Annotated[int | None, flag(EvalRecipe, "chunk")] = None,
    tile: Annotated[int | None, flag(EvalRecipe, "tile")] = None,
    max_memory: Annotated[str | None, flag(EvalRecipe, "max_memory", metavar="AMOUNT")] = None,
    num_speed_rounds: Annotated[int | None, flag(EvalRecipe, "num_speed_rounds")] = None,
    speed_budget: Annotated[
        float | None, flag(EvalRecipe, "speed_budget", metavar="SECONDS", default="60, with --speed none")
    ] = None,
    speed: Annotated[bool | None, switch(EvalRecipe, "speed", **SPEED_PANEL)] = None,
    sizes: Annotated[str | None, flag(EvalRecipe, "sizes", metavar="SIZE,...", **SPEED_PANEL)] = None,
    frames: Annotated[str | None, flag(EvalRecipe, "frames", metavar="N,...", **SPEED_PANEL)] = None,
    compile: Annotated[bool | None, switch(EvalRecipe, "compile", **SPEED_PANEL)] = None,
    autotune: Annotated[bool | None, switch(EvalRecipe, "autotune", **SPEED_PANEL)] = None,
    video: Annotated[bool | None, switch(EvalRecipe, "video")] = None,
    lpips: Annotated[Literal["auto", "on", "off"] | None, flag(EvalRecipe, "lpips")] = None,
    vmaf: Annotated[Literal["auto", "on", "off"] | None, flag(EvalRecipe, "vmaf")] = None,
    protocol: Annotated[Literal["ucf101", "davis", "panda"] | None, flag(EvalRecipe, "protocol")] = None,
    center_crop: Annotated[int | None, flag(EvalRecipe, "center_crop")] = None,
    features: Annotated[str | None, flag(EvalRecipe, "features", metavar="FILE", **FEATURES_PANEL)] = None,
    features_input: Annotated[
        Literal["clip", "image"] | None, flag(EvalRecipe, "features_input", **FEATURES_PANEL)
    ] = None,
    features_frames: Annotated[int | None, flag(EvalRecipe, "features_frames", **FEATURES_PANEL)] = None,
    features_size: Annotated[int | None, flag(EvalRecipe, "features_size", **FEATURES_PANEL)] = None,
    features_range: Annotated[
        Literal["signed", "unit", "bytes"] | None, flag(EvalRecipe, "features_range", **FEATURES_PANEL)
    ] = None,
    require: Annotated[list[str] | None, flag(EvalRecipe, "require", metavar="CONDITION", **GATES_PANEL)] = None,
    junit: Annotated[str | None, flag(EvalRecipe, "junit", metavar="FILE", **GATES_PANEL)] = None,
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
    """Compare a decoder with its original on clips: quality, sharpness, speed, size.

    Reads a decoder and clips; writes a folder with report.json, report.md and a side-by-side video.
    With --speed: reads a decoder, times it against its original, writes speed.json and speed.md.
    """
    settings = resolve_settings(context, EvalRecipe)
    if settings.speed:
        from flashvaed_cli.stages.speed.run import run_speed

        run_stage(context, run_speed, settings)
        return
    from flashvaed_cli.stages.evaluate.run import run_evaluate

    gates = run_stage(context, run_evaluate, settings).as_dict().get("gates")
    if isinstance(gates, list) and (failed := [gate["text"] for gate in gates if not gate["passed"]]):
        raise GateFailed("\n".join([f"{len(failed)} of {len(gates)} conditions do not hold:", *failed]))
