"""`flashvaed analyze`."""

from __future__ import annotations

import typer

from flashvaed_cli.cli.running import run_stage
from flashvaed_cli.cli.signature import CALIBRATION_CLIPS, Command
from flashvaed_cli.recipe import AnalyzeRecipe


def analyze(context: typer.Context, settings: AnalyzeRecipe) -> None:
    """Measure a decoder stage by stage: size, latency, and how many of its channels are independent.

    Reads a VAE and clips; writes analysis.safetensors, which prune uses.
    """
    from flashvaed_cli.stages.analyze import run_analyze

    run_stage(context, run_analyze, settings)


COMMAND = Command(
    recipe=AnalyzeRecipe,
    run=analyze,
    options=("rule", "plots", "original", "output"),
    panels={
        "Clips": CALIBRATION_CLIPS,
        "Timing": ("latency_frames", "latency_side", "num_latency_rounds", "width_latency_s"),
    },
    examples=(
        "flashvaed analyze",
        "flashvaed analyze Wan2.1_VAE.pth --data clips/ --num-calibration-clips 16",
        "flashvaed analyze --plots --output build/analysis.safetensors",
    ),
)
