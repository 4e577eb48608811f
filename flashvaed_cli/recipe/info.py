"""The settings of `flashvaed info`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from flashvaed_cli.recipe.fields import (
    ANALYSIS_FILE,
    BUILTIN_VAE,
    CONVERTED_FILE,
    FLASH_FILE,
    PRUNED_FILE,
    Names,
)
from flashvaed_cli.recipe.quantities import parse_bucket
from flashvaed_cli.recipe.settings import CommandRecipe


def _checked_size(text: str) -> str:
    parse_bucket(text)
    return text


class InfoRecipe(CommandRecipe):
    """Settings of `flashvaed info`."""

    command: ClassVar[str] = "info"
    default_inputs: ClassVar[tuple[str, ...]] = (
        FLASH_FILE,
        CONVERTED_FILE,
        PRUNED_FILE,
        ANALYSIS_FILE,
        BUILTIN_VAE,
    )

    files: Names = Field(
        default=(),
        description="Artifacts, other programs' checkpoints, diffusers folders, hf:// addresses or builtin:NAME. "
        "Several are shown side by side.",
    )
    size: Annotated[str, AfterValidator(_checked_size)] = Field(
        default="9x256x256", description="FRAMESxHEIGHTxWIDTH of the video that the operations are counted for."
    )
