"""The settings of `flashvaed convert-ops`, and what goes together."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from flashvaed_cli.recipe.fields import (
    BUILTIN_VAE,
    CONVERTED_FILE,
    PRUNED_FILE,
    Count,
    KeepRatio,
    Name,
    OperatorProfile,
    StageOperator,
)
from flashvaed_cli.recipe.settings import ReconstructingRecipe


class ConvertOpsRecipe(ReconstructingRecipe):
    """Settings of `flashvaed convert-ops`."""

    command: ClassVar[str] = "convert-ops"
    default_inputs: ClassVar[tuple[str, ...]] = (PRUNED_FILE, BUILTIN_VAE)

    input: Name | None = Field(
        default=None, description="Decoder to convert: a file, folder, hf:// address or builtin:NAME."
    )
    profile: OperatorProfile = Field(
        default="paper",
        description="paper: the paper's cheaper operator for each stage, weights refitted. exact: for each layer "
        "the fastest operator that gives the same frames, without data. image: the decoder of single images (one "
        "latent frame) that gives the same pixels, without data; its layers work on frames alone.",
    )
    operators: dict[Name, StageOperator] = Field(
        default={}, description="Operator by stage name, in place of the profile's."
    )
    time_rank: KeepRatio | None = Field(
        default=None,
        description="Factorise the kernels that double the frames: the fraction of their full rank that is kept. "
        "Without it they stay whole, as in the paper.",
    )
    num_separable_iterations: Count = Field(
        default=3, description="Alternations between the depthwise and the pointwise solve of one layer."
    )
    output: Name = Field(default=CONVERTED_FILE, description="Decoder artifact to write.")

    @model_validator(mode="after")
    def _only_paper_takes_operators(self) -> ConvertOpsRecipe:
        given = {"operators": bool(self.operators), "time_rank": self.time_rank is not None}
        if self.profile != "paper" and (names := [f"`{name}`" for name, is_given in given.items() if is_given]):
            listed = " and ".join(names)
            raise ValueError(f"`profile` is {self.profile}, which gives every layer its operator: leave {listed} out")
        return self
