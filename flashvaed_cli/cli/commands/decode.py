"""`flashvaed decode`."""

from __future__ import annotations

import sys
from functools import partial
from io import BufferedIOBase
from typing import Annotated, cast

import typer

from flashvaed_cli.cli.options import (
    AllowDownloadOption,
    DeviceOption,
    DTypeOption,
    FamilyOption,
    ForceOption,
    JsonOption,
    QuietOption,
    WeightsOption,
    flag,
    switch,
)
from flashvaed_cli.cli.running import USING_PANEL, resolve_settings, run_stage
from flashvaed_cli.cli.streams import was_closed
from flashvaed_cli.errors import DecodeError
from flashvaed_cli.recipe import DecodeRecipe
from flashvaed_cli.recipe.decode import STDOUT
from flashvaed_cli.recipe.fields import FrameFormat, LatentScale

VIDEO_PANEL = {"rich_help_panel": "Video"}
RUN_PANEL = {"rich_help_panel": "Running"}
PLACES = ", ".join(DecodeRecipe.default_inputs)
EPILOG = """Examples:

flashvaed decode latents.safetensors -o out.mp4

flashvaed decode latents.pt -d builtin:tiny-wan --latent-scale raw --fps 24 --crf 12 -o out.mp4

flashvaed decode latents/ -o videos/

flashvaed decode long.npy --max-memory 4GB --dtype bfloat16 -o frames/ --format png

flashvaed decode latents.pt -o - | ffplay -f rawvideo -pixel_format rgb24 -video_size 832x480 -framerate 16 -"""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("decode", epilog=EPILOG, rich_help_panel=USING_PANEL)(decode)


def decode(
    context: typer.Context,
    latents: Annotated[
        list[str],
        typer.Argument(metavar="LATENTS...", help=DecodeRecipe.model_fields["latents"].description, show_default=False),
    ],
    decoder: Annotated[
        str | None,
        flag(DecodeRecipe, "decoder", "--decoder", "-d", default=f"the first that exists of {PLACES}", metavar="FILE"),
    ] = None,
    output: Annotated[
        str | None, flag(DecodeRecipe, "output", "--output", "-o", default="an MP4 here, named like the latents")
    ] = None,
    latent_scale: Annotated[LatentScale | None, flag(DecodeRecipe, "latent_scale")] = None,
    format: Annotated[FrameFormat | None, flag(DecodeRecipe, "format", default="mp4", **VIDEO_PANEL)] = None,
    fps: Annotated[str | None, flag(DecodeRecipe, "fps", default="the model family's own", **VIDEO_PANEL)] = None,
    crf: Annotated[int | None, flag(DecodeRecipe, "crf", **VIDEO_PANEL)] = None,
    chunk: Annotated[int | None, flag(DecodeRecipe, "chunk", default="4, or what fits", **RUN_PANEL)] = None,
    tile: Annotated[int | None, flag(DecodeRecipe, "tile", default="whole frames, or what fits", **RUN_PANEL)] = None,
    max_memory: Annotated[
        str | None, flag(DecodeRecipe, "max_memory", default="what is free", metavar="AMOUNT", **RUN_PANEL)
    ] = None,
    compile: Annotated[bool | None, switch(DecodeRecipe, "compile", **RUN_PANEL)] = None,
    family: FamilyOption = None,
    weights: WeightsOption = None,
    allow_download: AllowDownloadOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Turn latents into videos, with memory that does not grow with their length.

    Reads latents and a decoder, an original one too; writes one video for each clip: an MP4 (H.264), pictures, arrays,
    or raw frames for a pipe. Where one fails the others are written, and the exit code is 2.
    """
    settings = resolve_settings(context, DecodeRecipe)
    to_stdout = settings.output == STDOUT
    if to_stdout and sys.stdout.isatty():
        raise DecodeError("--output - gives raw frames, and standard output is a terminal. Pipe it into a program.")
    if to_stdout and was_closed(sys.stdout):
        raise DecodeError("--output - gives raw frames, and standard output is closed. Pipe it into a program.")
    from flashvaed_cli.stages.decode.run import run_decode

    stage = partial(run_decode, stdout=cast(BufferedIOBase, sys.stdout.buffer) if to_stdout else None)
    failed = run_stage(context, stage, settings, result_on_stderr=to_stdout).as_dict().get("failed")
    if isinstance(failed, list) and failed:
        reasons = [f"{entry['latents']}: {entry['reason']}" for entry in failed]
        raise DecodeError("\n".join(["not everything could be decoded; the rest is there:", *reasons]))
