"""`flashvaed distill`."""

from __future__ import annotations

import typer

from flashvaed_cli.cli.running import run_stage
from flashvaed_cli.cli.signature import PREVIEWED_SWITCHES, Command
from flashvaed_cli.recipe import DistillRecipe, PhaseRecipe


def distill(context: typer.Context, settings: DistillRecipe) -> None:
    """Train a decoder to give what the original gives, in the paper's three phases.

    Reads a decoder and clips; writes flash.safetensors. Ratio and rule name the channels that phase 2 prepares
    for pruning. An interrupted run goes on where it was. With --student a new, light decoder is trained instead, from
    the original's frames alone.
    """
    from flashvaed_cli.stages.distill.run import run_distill
    from flashvaed_cli.stages.dry_run import preview_distill

    run_stage(context, preview_distill if context.params["dry_run"] else run_distill, settings)


COMMAND = Command(
    recipe=DistillRecipe,
    run=distill,
    options=("phase", "num_steps", "learning_rate", "original", "output"),
    panels={
        "Clips": (
            "data",
            "latent_scale",
            "num_clips",
            "num_frames",
            "crop_size",
            "max_side",
            "buckets",
            "num_workers",
            "cache_latents",
            "cache_dtype",
        ),
        "Optimization": (
            "batch_size",
            "loss_weights",
            "adversarial_start",
            "optimizer",
            "weight_decay",
            "gradient_clip_norm",
            "max_relative_step",
            "learning_rate_schedule",
            "num_warmup_steps",
            "ema_decay",
            "gradient_accumulation",
            "checkpoint_activations",
            "compile",
        ),
        "What phase 2 prepares for pruning": ("keep_ratio", "rule"),
        "A new, light decoder": ("student", "student_width", "student_start"),
        "Validation, checkpoints, logs": (
            "validation_data",
            "validate_every_steps",
            "checkpoint_every_steps",
            "checkpoint_every_minutes",
            "sample_every_minutes",
            "tensorboard",
            "resume",
        ),
    },
    switches=PREVIEWED_SWITCHES,
    defaults={name: str(PhaseRecipe.model_fields[name].default) for name in ("num_steps", "learning_rate")},
    examples=(
        "flashvaed distill",
        "flashvaed distill converted.safetensors --phase 3 --num-steps 2000 --data clips/ --batch-size 4",
        "flashvaed distill --recipe paper --step phase1 --loss-weight sharpness=0.5",
        "flashvaed distill wan.safetensors --student tae --student-width 64 --num-steps 20000 --data clips/",
    ),
)
