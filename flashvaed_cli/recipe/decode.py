"""The settings of `flashvaed decode`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from flashvaed_cli.recipe.fields import (
    BUILTIN_VAE,
    CONVERTED_FILE,
    FLASH_FILE,
    PRUNED_FILE,
    Count,
    FrameFormat,
    LatentScale,
    Memory,
    Name,
    Names,
    Switch,
    number_as_text,
)
from flashvaed_cli.recipe.quantities import parse_frame_rate
from flashvaed_cli.recipe.settings import CommandRecipe

STDOUT = "-"
"""As an output: raw frames on standard output."""


def _checked_frame_rate(text: str) -> str:
    parse_frame_rate(text)
    return text


FrameRate = Annotated[str, BeforeValidator(number_as_text), AfterValidator(_checked_frame_rate)]


class DecodeRecipe(CommandRecipe):
    """Settings of `flashvaed decode`."""

    command: ClassVar[str] = "decode"
    default_inputs: ClassVar[tuple[str, ...]] = (FLASH_FILE, CONVERTED_FILE, PRUNED_FILE, BUILTIN_VAE)

    latents: Annotated[Names, Field(min_length=1)] = Field(
        description="Latent files (.safetensors, .pt, .pth, .npy, .latent), folders or patterns of them, lists (.txt)."
    )
    decoder: Name | None = Field(
        default=None, description="Decoder to use: a file, folder, hf:// address or builtin:NAME."
    )
    latent_scale: LatentScale = Field(
        default="normalized",
        description="Scale of the latents: normalized as diffusion models use them, or raw (x * std + mean).",
    )
    output: Name | None = Field(
        default=None,
        description="File (.mp4, .png, .npy, .pt), folder, or - for raw rgb24 frames on standard output. Several clips "
        "need a folder and give one video each.",
    )
    format: FrameFormat | None = Field(
        default=None,
        description="What to write where --output is a folder: mp4, png (a picture per frame), npy or pt (floats "
        "[3, F, H, W] in [-1, 1]).",
    )
    fps: FrameRate | None = Field(
        default=None, description="Frames per second of an MP4, such as 24 or 30000/1001; does not change the frames."
    )
    crf: Annotated[int, Field(ge=0, le=51, strict=True)] = Field(
        default=16,
        description="Quality of an MP4 on x264's scale: 0 is the best, 23 x264's default, 51 the smallest file.",
    )
    chunk: Count | None = Field(
        default=None, description="Latent frames decoded at a time; limits memory, does not change the frames."
    )
    tile: Count | None = Field(
        default=None, description="Side, in latents, of tiles to decode separately; does not change the frames."
    )
    clip_length: Count | None = Field(
        default=None,
        description="Latent frames that are one clip, of a decoder that sees whole clips (info says so): longer ones "
        "are decoded in runs of so many. Changes the frames.",
    )
    max_memory: Memory | None = Field(
        default=None,
        description="Choose chunk and tile so that decoding stays below this amount of memory, such as 4GB.",
    )
    compile: Switch = Field(
        default=False,
        description="Compile the decoder with torch.compile: the first call takes minutes. Meant for GPUs; on the one "
        "CPU measured, decoding takes longer than without.",
    )
