"""`flashvaed decode`."""

from __future__ import annotations

import sys
from functools import partial
from io import BufferedIOBase
from typing import cast

import typer

from flashvaed_cli.cli.running import run_stage
from flashvaed_cli.cli.signature import USING_PANEL, Command
from flashvaed_cli.cli.streams import was_closed
from flashvaed_cli.errors import DecodeError
from flashvaed_cli.recipe import DecodeRecipe
from flashvaed_cli.recipe.decode import STDOUT


def decode(context: typer.Context, settings: DecodeRecipe) -> None:
    """Turn latents into videos, with memory that does not grow with their length.

    Reads latents and a decoder (an original works too); writes one video for each clip: an MP4 (H.264), pictures,
    arrays, or raw frames for a pipe. If one fails, the others are still written, and the exit code is 2.
    """
    to_stdout = settings.output == STDOUT
    if to_stdout and sys.stdout.isatty():
        raise DecodeError("--output - writes raw frames, but standard output is a terminal. Pipe it into a program.")
    if to_stdout and was_closed(sys.stdout):
        raise DecodeError("--output - writes raw frames, but standard output is closed. Pipe it into a program.")
    from flashvaed_cli.stages.decode.run import run_decode

    stage = partial(run_decode, stdout=cast(BufferedIOBase, sys.stdout.buffer) if to_stdout else None)
    failed = run_stage(context, stage, settings, result_on_stderr=to_stdout).as_dict().get("failed")
    if isinstance(failed, list) and failed:
        reasons = [f"{entry['latents']}: {entry['reason']}" for entry in failed]
        raise DecodeError("\n".join(["not everything could be decoded; the rest was written:", *reasons]))


COMMAND = Command(
    recipe=DecodeRecipe,
    run=decode,
    options=("decoder", "output", "latent_scale"),
    panels={
        "Video": ("format", "fps", "crf"),
        "Running": ("chunk", "tile", "clip_length", "max_memory", "compile"),
    },
    common=("family", "weights", "allow_download", "device", "dtype"),
    switches=("force", "quiet", "json_output"),
    defaults={
        "decoder": f"the first that exists of {', '.join(DecodeRecipe.default_inputs)}",
        "output": "an MP4 here, named like the latents",
        "format": "mp4",
        "fps": "the model family's own",
        "chunk": "4, or what fits",
        "tile": "whole frames, or what fits",
        "clip_length": "the decoder's own",
        "max_memory": "what is free",
    },
    help_panel=USING_PANEL,
    examples=(
        "flashvaed decode latents.safetensors -o out.mp4",
        "flashvaed decode latents.pt -d builtin:tiny-wan --latent-scale raw --fps 24 --crf 12 -o out.mp4",
        "flashvaed decode latents/ -o videos/",
        "flashvaed decode long.npy --max-memory 4GB --dtype bfloat16 -o frames/ --format png",
        "flashvaed decode latents.pt -o - | ffplay -f rawvideo -pixel_format rgb24 -video_size 832x480 -framerate 16 -",
    ),
)
