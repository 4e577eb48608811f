"""The settings of `flashvaed prune`, and what goes together."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from flashvaed_cli.recipe.fields import (
    ANALYSIS_FILE,
    BUILTIN_VAE,
    PRUNED_FILE,
    Count,
    Name,
    Positive,
    StudentLayout,
    Switch,
)
from flashvaed_cli.recipe.settings import RatioFields, ReconstructingRecipe


class PruneRecipe(ReconstructingRecipe, RatioFields):
    """Settings of `flashvaed prune`."""

    command: ClassVar[str] = "prune"
    default_inputs: ClassVar[tuple[str, ...]] = (BUILTIN_VAE,)

    input: Name | None = Field(
        default=None, description="Decoder to prune: a file, folder, hf:// address or builtin:NAME."
    )
    analysis: Name | None = Field(
        default=None,
        description=f"Analysis of that decoder. Without it, {ANALYSIS_FILE} if that fits, else made on the fly.",
    )
    layout: StudentLayout = Field(
        default="free",
        description="free: each channel group has a width of its own. native: the original at another base width, "
        "which the family's stock classes load; the ratio is that of the whole decoder.",
    )
    with_encoder: Switch = Field(
        default=False,
        description="With the native layout: narrow and refit the encoder to the same width, for programs that build "
        "both at one width.",
    )
    round_to: Count = Field(
        default=1, description="Round kept channel counts to the nearest multiple of this, at least one."
    )
    target_speedup: Annotated[float, Field(gt=1, strict=True)] | None = Field(
        default=None,
        description="Instead of ratios: prune the family's shallow stages until decoding is predicted to be this many "
        "times as fast as that of the input, on this device, by the latency model of the analysis; with the native "
        "layout, the whole decoder, by timing widths.",
    )
    target_gflops: Positive | None = Field(
        default=None,
        description="Instead of ratios: prune the family's shallow stages until decoding the timed clip takes this "
        "many GFLOP.",
    )
    latency_frames: Count | None = Field(
        default=None, description="Frames of the clip that a target refers to. Default: those of the analysis, or 9."
    )
    latency_side: Count | None = Field(
        default=None,
        description="Height and width of the clip that a target refers to. Default: those of the analysis, or 128.",
    )
    output: Name = Field(default=PRUNED_FILE, description="Decoder artifact to write.")

    @model_validator(mode="after")
    def _one_way_to_choose_widths(self) -> PruneRecipe:
        given = {
            "keep_ratio": self.keep_ratio is not None,
            "stage_keep_ratios": bool(self.stage_keep_ratios),
            "group_keep_ratios": bool(self.group_keep_ratios),
            "target_speedup": self.target_speedup is not None,
            "target_gflops": self.target_gflops is not None,
        }
        chosen = [name for name, is_given in given.items() if is_given]
        if len(chosen) > 1 and chosen[-1].startswith("target"):
            listed = ", ".join(f"`{name}`" for name in chosen)
            raise ValueError(f"{listed}: a target chooses the ratios itself; give one target, or ratios")
        uneven = [name for name in ("stage_keep_ratios", "group_keep_ratios") if given[name]]
        if self.layout == "native" and uneven:
            raise ValueError(
                f"`{uneven[0]}`: the native layout has one ratio for the whole decoder; give that one, or leave "
                "`layout: native` out"
            )
        if self.with_encoder and self.layout != "native":
            raise ValueError("`with_encoder`: only `layout: native` narrows an encoder; add that, or leave it out")
        return self

    @property
    def names_widths(self) -> bool:
        """Whether a ratio or a target is given."""
        ratios = self.keep_ratio is not None or bool(self.stage_keep_ratios) or bool(self.group_keep_ratios)
        return ratios or self.has_target

    @property
    def has_target(self) -> bool:
        """Whether widths come from a budget instead of ratios."""
        return self.target_speedup is not None or self.target_gflops is not None
