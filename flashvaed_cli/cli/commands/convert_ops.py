"""`flashvaed convert-ops`."""

from __future__ import annotations

import typer

from flashvaed_cli.cli.running import run_stage
from flashvaed_cli.cli.signature import CALIBRATION_CLIPS, PREVIEWED_SWITCHES, Command
from flashvaed_cli.recipe import ConvertOpsRecipe


def convert_ops(context: typer.Context, settings: ConvertOpsRecipe) -> None:
    """Give every stage the cheapest operator that it can bear, and solve the new kernels by least squares.

    Reads a decoder and clips; writes converted.safetensors. Operators: causal3d, dwsep3d, frame2d.
    """
    from flashvaed_cli.stages.convert_ops import run_convert_ops
    from flashvaed_cli.stages.dry_run import preview_convert_ops

    run_stage(context, preview_convert_ops if context.params["dry_run"] else run_convert_ops, settings)


COMMAND = Command(
    recipe=ConvertOpsRecipe,
    run=convert_ops,
    options=("profile", "operators", "time_rank", "original", "output"),
    panels={
        "New weights": ("reconstruct", "dampening_frac", "num_separable_iterations"),
        "Clips": CALIBRATION_CLIPS,
    },
    switches=(*PREVIEWED_SWITCHES, "verbose"),
    examples=(
        "flashvaed convert-ops",
        "flashvaed convert-ops pruned.safetensors --operator up2=frame2d --operator mid=causal3d",
        "flashvaed convert-ops Wan2.1_VAE.pth --data clips/ --output converted.safetensors",
        "flashvaed convert-ops --time-rank 0.25",
        "flashvaed convert-ops Wan2.1_VAE.pth --profile exact --output exact.safetensors",
        "flashvaed convert-ops qwen_image_vae.safetensors --family qwen-image --profile image -o images.safetensors",
    ),
)
