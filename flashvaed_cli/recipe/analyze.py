"""The settings of `flashvaed analyze`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from flashvaed_cli.recipe.fields import ANALYSIS_FILE, BUILTIN_VAE, Count, Name, OptionalCount, Switch
from flashvaed_cli.recipe.settings import CalibratedRecipe, RuleField, StageRecipe


class AnalyzeRecipe(CalibratedRecipe, RuleField, StageRecipe):
    """Settings of `flashvaed analyze`."""

    command: ClassVar[str] = "analyze"
    default_inputs: ClassVar[tuple[str, ...]] = (BUILTIN_VAE,)

    input: Name | None = Field(
        default=None, description="VAE to analyze: a file, folder, hf:// address or builtin:NAME."
    )
    latency_frames: Count = Field(
        default=9, description="Frames of the clip whose decoding is timed, rounded up to whole latents."
    )
    latency_side: Count = Field(
        default=128,
        description="Height and width in pixels of the clip whose decoding is timed, rounded up to whole latents.",
    )
    num_latency_rounds: Count = Field(
        default=3,
        description="Timed rounds, after a warm-up round; the median counts. Slow decoders get fewer unless this is "
        "given.",
    )
    width_latency_s: OptionalCount = Field(
        default=30,
        description="Roughly how many seconds to spend on the latency at narrower widths, which prune "
        "--target-speedup needs; slow decoders take one round, however long; 0 leaves it out.",
    )
    plots: Switch = Field(default=False, description="Also draw R2 curves, spectra and latency shares as PNG files.")
    output: Name = Field(default=ANALYSIS_FILE, description="Analysis artifact to write.")
