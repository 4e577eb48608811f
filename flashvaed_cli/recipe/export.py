"""The settings of `flashvaed export`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from flashvaed_cli.recipe.fields import (
    BUILTIN_VAE,
    CONVERTED_FILE,
    FLASH_FILE,
    PRUNED_FILE,
    ExportTarget,
    Name,
    one_as_tuple,
)
from flashvaed_cli.recipe.settings import StageRecipe


class ExportRecipe(StageRecipe):
    """Settings of `flashvaed export`."""

    command: ClassVar[str] = "export"
    default_inputs: ClassVar[tuple[str, ...]] = (FLASH_FILE, CONVERTED_FILE, PRUNED_FILE, BUILTIN_VAE)

    input: Name | None = Field(
        default=None, description="Decoder to export: a file, folder, hf:// address or builtin:NAME."
    )
    original: Name | None = Field(
        default=None,
        description="The original VAE, whose encoder is exported too, where it is not the one the input remembers.",
    )
    targets: Annotated[tuple[ExportTarget, ...], BeforeValidator(one_as_tuple), Field(min_length=1)] = Field(
        default=("safetensors", "diffusers", "onnx"),
        description="Formats to write: safetensors, diffusers, onnx, comfyui, pt2, aoti (pt2 compiled for this "
        "machine); repeatable. Without it the first three, diffusers where it has a model like the decoder.",
    )
    opset: Annotated[int, Field(ge=18, strict=True)] = Field(default=18, description="ONNX operator set.")
    output: Name = Field(default="export", description="Folder to write to.")
