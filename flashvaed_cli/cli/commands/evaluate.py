"""`flashvaed eval`."""

from __future__ import annotations

import typer

from flashvaed_cli.cli.running import run_stage
from flashvaed_cli.cli.signature import Command
from flashvaed_cli.errors import GateFailed
from flashvaed_cli.recipe import EvalRecipe


def evaluate(context: typer.Context, settings: EvalRecipe) -> None:
    """Compare a decoder with its original on clips: quality, sharpness, speed, size.

    Reads a decoder and clips; writes a folder with report.html, report.json, report.md and a side-by-side video.
    With --speed: reads a decoder, times it against its original, writes speed.json and speed.md.
    """
    if settings.speed:
        from flashvaed_cli.stages.speed.run import run_speed

        run_stage(context, run_speed, settings)
        return
    from flashvaed_cli.stages.evaluate.run import run_evaluate

    gates = run_stage(context, run_evaluate, settings).as_dict().get("gates")
    if isinstance(gates, list) and (failed := [gate["text"] for gate in gates if not gate["passed"]]):
        raise GateFailed("\n".join([f"{len(failed)} of {len(gates)} conditions failed:", *failed]))


COMMAND = Command(
    recipe=EvalRecipe,
    run=evaluate,
    options=("compare", "original", "output"),
    panels={
        "Clips": (
            "data",
            "latent_scale",
            "num_clips",
            "num_frames",
            "max_side",
            "center_crop",
            "protocol",
        ),
        "Measures": ("lpips", "vmaf", "video", "num_speed_rounds", "speed_budget", "pipeline_seconds"),
        "Fréchet distance": (
            "features",
            "features_input",
            "features_frames",
            "features_size",
            "features_range",
        ),
        "Conditions": ("require", "junit"),
        "Memory": ("chunk", "tile", "max_memory"),
        "Speed alone": ("speed", "sizes", "frames", "compile", "autotune"),
    },
    defaults={"num_clips": "all", "num_frames": "all", "speed_budget": "60, with --speed none"},
    examples=(
        "flashvaed eval",
        "flashvaed eval flash.safetensors --data holiday.mp4 --max-side 480 --output report-holiday",
        "flashvaed eval --lpips on --no-video --json",
        'flashvaed eval --require "psnr_retention>=0.969" --require "speedup>=4" --junit eval.xml',
        "flashvaed eval --protocol davis --data DAVIS/ --features i3d_torchscript.pt",
        "flashvaed eval --speed --frames 9,81 --sizes 256x256,480p --dtype bfloat16",
        "flashvaed eval flash.safetensors --speed --sizes 1080p --frames 17 --max-memory 4GB --compile",
        "flashvaed eval --speed --autotune --sizes 480p",
        "flashvaed eval --speed --frames 81 --sizes 480p --pipeline-seconds 30",
    ),
)
