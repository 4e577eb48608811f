"""`flashvaed distill`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flashvaed_cli.cli.options import (
    DATA_SETTINGS,
    RATIO_SETTINGS,
    AllowDownloadOption,
    DeviceOption,
    DryRunOption,
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
    keyed_overrides,
    ratio_overrides,
    switch,
)
from flashvaed_cli.cli.running import resolve_settings, run_stage
from flashvaed_cli.recipe import DistillRecipe, PhaseRecipe
from flashvaed_cli.recipe.fields import LatentScale, PhaseChoice, SelectionRule

CLIPS = {"rich_help_panel": "Clips"}
OPTIMIZATION = {"rich_help_panel": "Optimization"}
PHASE2 = {"rich_help_panel": "What phase 2 prepares for pruning"}
WATCHING = {"rich_help_panel": "Validation, checkpoints, logs"}
EPILOG = """Examples:

flashvaed distill

flashvaed distill converted.safetensors --phase 3 --num-steps 2000 --data clips/ --batch-size 4

flashvaed distill --recipe paper --step phase1 --loss-weight sharpness=0.5"""

_OWN_NUM_STEPS = str(PhaseRecipe.model_fields["num_steps"].default)
_OWN_LEARNING_RATE = str(PhaseRecipe.model_fields["learning_rate"].default)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("distill", epilog=EPILOG)(distill)


def distill(
    context: typer.Context,
    input: Annotated[str | None, input_argument(DistillRecipe)] = None,
    phase: Annotated[PhaseChoice | None, flag(DistillRecipe, "phase")] = None,
    num_steps: Annotated[int | None, flag(DistillRecipe, "num_steps", default=_OWN_NUM_STEPS)] = None,
    learning_rate: Annotated[float | None, flag(DistillRecipe, "learning_rate", default=_OWN_LEARNING_RATE)] = None,
    data: Annotated[list[str] | None, flag(DistillRecipe, "data", "--data", "-d", **DATA_SETTINGS, **CLIPS)] = None,
    latent_scale: Annotated[LatentScale | None, flag(DistillRecipe, "latent_scale", **CLIPS)] = None,
    original: Annotated[str | None, flag(DistillRecipe, "original")] = None,
    num_clips: Annotated[int | None, flag(DistillRecipe, "num_clips", **CLIPS)] = None,
    batch_size: Annotated[int | None, flag(DistillRecipe, "batch_size", **OPTIMIZATION)] = None,
    num_frames: Annotated[int | None, flag(DistillRecipe, "num_frames", **CLIPS)] = None,
    crop_size: Annotated[int | None, flag(DistillRecipe, "crop_size", **CLIPS)] = None,
    max_side: Annotated[int | None, flag(DistillRecipe, "max_side", **CLIPS)] = None,
    buckets: Annotated[
        list[str] | None,
        flag(DistillRecipe, "buckets", "--bucket", metavar="FRAMESxHEIGHTxWIDTH", default="none", **CLIPS),
    ] = None,
    num_workers: Annotated[int | None, flag(DistillRecipe, "num_workers", **CLIPS)] = None,
    cache_latents: Annotated[str | None, flag(DistillRecipe, "cache_latents", metavar="DIR", **CLIPS)] = None,
    cache_dtype: Annotated[str | None, flag(DistillRecipe, "cache_dtype", metavar="float32|float16", **CLIPS)] = None,
    loss_weight: Annotated[
        list[str] | None,
        flag(
            DistillRecipe, "loss_weights", "--loss-weight", metavar="TERM=WEIGHT", default="the paper's", **OPTIMIZATION
        ),
    ] = None,
    optimizer: Annotated[Literal["soap", "adamw"] | None, flag(DistillRecipe, "optimizer", **OPTIMIZATION)] = None,
    weight_decay: Annotated[float | None, flag(DistillRecipe, "weight_decay", **OPTIMIZATION)] = None,
    gradient_clip_norm: Annotated[float | None, flag(DistillRecipe, "gradient_clip_norm", **OPTIMIZATION)] = None,
    max_relative_step: Annotated[float | None, flag(DistillRecipe, "max_relative_step", **OPTIMIZATION)] = None,
    learning_rate_schedule: Annotated[
        Literal["cosine", "constant"] | None, flag(DistillRecipe, "learning_rate_schedule", **OPTIMIZATION)
    ] = None,
    num_warmup_steps: Annotated[int | None, flag(DistillRecipe, "num_warmup_steps", **OPTIMIZATION)] = None,
    ema_decay: Annotated[float | None, flag(DistillRecipe, "ema_decay", **OPTIMIZATION)] = None,
    gradient_accumulation: Annotated[int | None, flag(DistillRecipe, "gradient_accumulation", **OPTIMIZATION)] = None,
    checkpoint_activations: Annotated[
        bool | None, switch(DistillRecipe, "checkpoint_activations", **OPTIMIZATION)
    ] = None,
    compile: Annotated[bool | None, switch(DistillRecipe, "compile", **OPTIMIZATION)] = None,
    ratio: Annotated[
        list[str] | None, flag(DistillRecipe, "keep_ratio", "--ratio", "-r", **RATIO_SETTINGS, **PHASE2)
    ] = None,
    rule: Annotated[SelectionRule | None, flag(DistillRecipe, "rule", **PHASE2)] = None,
    validation_data: Annotated[
        list[str] | None, flag(DistillRecipe, "validation_data", "--validation-data", **DATA_SETTINGS, **WATCHING)
    ] = None,
    validate_every_steps: Annotated[int | None, flag(DistillRecipe, "validate_every_steps", **WATCHING)] = None,
    checkpoint_every_steps: Annotated[int | None, flag(DistillRecipe, "checkpoint_every_steps", **WATCHING)] = None,
    checkpoint_every_minutes: Annotated[
        float | None, flag(DistillRecipe, "checkpoint_every_minutes", **WATCHING)
    ] = None,
    sample_every_minutes: Annotated[float | None, flag(DistillRecipe, "sample_every_minutes", **WATCHING)] = None,
    tensorboard: Annotated[str | None, flag(DistillRecipe, "tensorboard", metavar="DIR", **WATCHING)] = None,
    resume: Annotated[Literal["auto", "never"] | None, flag(DistillRecipe, "resume", **WATCHING)] = None,
    output: Annotated[str | None, flag(DistillRecipe, "output", "--output", "-o")] = None,
    recipe: RecipeOption = None,
    step: StepOption = None,
    family: FamilyOption = None,
    weights: WeightsOption = None,
    allow_download: AllowDownloadOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Train a decoder to give what the original gives, in the paper's three phases.

    Reads a decoder and clips; writes flash.safetensors. Ratio and rule name the channels that phase 2 prepares
    for pruning. An interrupted run goes on where it was.
    """
    overrides = ratio_overrides(ratio)
    if by_term := keyed_overrides("--loss-weight", loss_weight, float):
        overrides["loss_weights"] = by_term
    settings = resolve_settings(context, DistillRecipe, overrides)
    if dry_run:
        from flashvaed_cli.stages.dry_run import preview_distill

        run_stage(context, preview_distill, settings)
        return
    from flashvaed_cli.stages.distill.run import run_distill

    run_stage(context, run_distill, settings)
