"""The settings that several commands share, as pydantic models: type, default and help text of each.

Every command has a model, in the file of the same name. The descriptions are also the flags' help texts
(`flashvaed_cli/cli/signature.py` reads them here), so each setting is named, explained and defaulted in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from flashvaed_cli.recipe.fields import (
    DEFAULT_KEEP_RATIO,
    Count,
    Device,
    DType,
    KeepRatio,
    LatentScale,
    Name,
    Names,
    OptionalCount,
    Positive,
    ReconstructMode,
    SelectionRule,
    Switch,
    WholeNumber,
)


class FrozenModel(BaseModel):
    """Immutable settings; unknown ones are refused, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CommandRecipe(FrozenModel):
    """What every command has.

    `command` is the name on the command line and in the YAML. `default_inputs` are the places where a command
    looks, in this order, if no input is given; the last one always exists.
    """

    command: ClassVar[str]
    default_inputs: ClassVar[tuple[str, ...]]

    family: Name | None = Field(
        default=None,
        description="Family of the input, if its names leave that open (wan2.1 and qwen-image have the same names).",
    )

    weights: Name | None = Field(
        default=None,
        description="Which weights to read if a file holds several sets: ema for averaged ones, or a name in the file.",
    )
    allow_download: Switch = Field(
        default=False,
        description="Download what is missing: an original on the Hub that the input names, or the weights of LPIPS.",
    )

    _origins: dict[tuple[str, ...], str] = PrivateAttr(default_factory=dict)

    def remember_origins(self, origins: Mapping[tuple[str, ...], str]) -> None:
        """Remember which settings a recipe file decided, and where, by field or by field and key."""
        self._origins.update(origins)

    def origin(self, field: str, key: str) -> str | None:
        """Where a recipe file gives a key of a field, such as `ltx.yaml, line 9: prune.stage_keep_ratios.up3`; None
        if a flag does."""
        return self._origins.get((field, key))

    def given(self, *fields: str) -> list[str]:
        """Those of `fields` that are not at their defaults, as flags: to say that they are ignored."""
        values = {name: getattr(self, name) for name in fields}
        return [
            ("--no-" if value is False else "--") + name.replace("_", "-")
            for name, value in values.items()
            if value != type(self).model_fields[name].default
        ]

    seed: WholeNumber = Field(default=0, le=2**31 - 1, description="Seed of everything random.")
    device: Device = Field(default="auto", description="Where to compute; auto takes CUDA, then MPS, then the CPU.")
    dtype: DType = Field(default="float32", description="Number format of weights and activations.")


class StageRecipe(CommandRecipe):
    """What commands have in common that read a decoder and write a result."""

    input: Name | None = Field(default=None, description="Decoder to read.")
    original: Name | None = Field(default=None, description="The original VAE. Default: the one recorded in the input.")
    output: Name = Field(description="What to write.")


class ClipFields(CommandRecipe):
    data: Names = Field(
        default=(),
        description="Videos or latent files, folders or patterns of them, lists (.txt, one path per line); repeatable. "
        "Default: the clips that ship with the program.",
    )
    latent_scale: LatentScale = Field(
        default="normalized",
        description="Scale of latent files: normalized as diffusion models use them, or raw (x * std + mean). "
        "ComfyUI's .latent files are raw.",
    )
    max_side: OptionalCount = Field(
        default=None,
        description="Shrink clips so that the longer side has at most this many pixels, rounded to whole latents.",
    )


class CalibratedRecipe(ClipFields):
    """What commands have in common that collect statistics on clips."""

    num_calibration_clips: Count = Field(default=8, description="Clips to collect statistics on.")
    num_frames: Count = Field(
        default=17, description="Frames per calibration clip, rounded down to what the VAE takes."
    )
    crop_size: OptionalCount = Field(
        default=128,
        description="Side in pixels of the square cut from each clip, rounded to whole latents; 0 takes everything.",
    )


class ReconstructingRecipe(CalibratedRecipe, StageRecipe):
    """What commands have that change layers and refit their weights."""

    reconstruct: ReconstructMode = Field(
        default="full",
        description="full refits whole kernels by least squares, channel only the map from the kept channels to those "
        "that a layer read before; none keeps the cut weights.",
    )
    dampening_frac: Positive = Field(default=1e-4, description="Ridge term, as a fraction of the inputs' variance.")


RULE_MEANINGS: Mapping[SelectionRule, str] = {
    "greedy-energy": "together explain most of the energy, means included; best in most trials",
    "greedy-r2": "together explain most of the variance; to reproduce the paper, whose rule it is",
    "next-layer": "explain most of what the next layers compute; if those ignore much of their input",
    "pivoted-qr": "have the largest variance not explained by those already chosen; fast, for very wide layers",
    "chip": "would lower the nuclear norm most if removed; to compare with CHIP",
    "l1": "have the largest weights; a baseline",
    "variance": "have the largest variance; a baseline",
    "random": "are drawn at random; to see what selection is worth at all",
}
"""The channels that each rule keeps, and when to use it."""


class RuleField(CommandRecipe):
    rule: SelectionRule = Field(
        default="greedy-energy",
        description="How the kept channels are chosen; the rules are listed at the end of this help.",
    )


class RatioFields(RuleField):
    keep_ratio: KeepRatio | None = Field(
        default=None,
        description=f"Fraction of channels kept in the family's shallow stages; {DEFAULT_KEEP_RATIO} if none is given.",
    )
    stage_keep_ratios: dict[Name, KeepRatio] = Field(
        default={}, description="Fraction of channels kept, by stage name; without keep_ratio, other stages stay whole."
    )
    group_keep_ratios: dict[Name, KeepRatio] = Field(
        default={},
        description="Fraction of channels kept, by channel group (up3.stream, up3.0.inner); overrides its stage's.",
    )

    @model_validator(mode="after")
    def _ratios_name_what_they_should(self) -> RatioFields:
        # A group's name is its stage's name, a dot and more.
        groups = [name for name in self.stage_keep_ratios if "." in name]
        stages = [name for name in self.group_keep_ratios if "." not in name]
        if groups:
            raise ValueError(
                f"`stage_keep_ratios`: {', '.join(groups)} is a channel group: give it in `group_keep_ratios`"
            )
        if stages:
            raise ValueError(f"`group_keep_ratios`: {', '.join(stages)} is a stage: give it in `stage_keep_ratios`")
        return self

    def ratios(self, shallow_stages: Sequence[str]) -> dict[str, float]:
        """Fraction kept, by name of stage or channel group; anything not listed stays whole.

        Args:
            shallow_stages: the family's stages that `keep_ratio` applies to.
        """
        keep_ratio = self.keep_ratio
        if keep_ratio is None and not self.stage_keep_ratios and not self.group_keep_ratios:
            keep_ratio = DEFAULT_KEEP_RATIO
        common = {} if keep_ratio is None else dict.fromkeys(shallow_stages, keep_ratio)
        return {**common, **self.stage_keep_ratios, **self.group_keep_ratios}
