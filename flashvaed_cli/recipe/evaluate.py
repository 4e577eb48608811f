"""The settings of `flashvaed eval`, and what goes together."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from flashvaed_cli.recipe.fields import (
    BUILTIN_VAE,
    CONVERTED_FILE,
    FLASH_FILE,
    PRUNED_FILE,
    Count,
    Counts,
    Memory,
    Name,
    Names,
    OptionalCount,
    OptionalPositive,
    Positive,
    Sizes,
    Switch,
)
from flashvaed_cli.recipe.quantities import NAMED_SIZES
from flashvaed_cli.recipe.settings import ClipFields, StageRecipe

_PROTOCOLS = {"ucf101": (17, 256), "davis": (17, 256), "panda": (33, 256)}
_SPEED_ONLY = ("sizes", "frames", "compile", "autotune")
_JUDGING_ONLY = ("require", "junit", "features", "protocol", "center_crop")


class EvalRecipe(ClipFields, StageRecipe):
    """Settings of `flashvaed eval`."""

    command: ClassVar[str] = "eval"
    default_inputs: ClassVar[tuple[str, ...]] = (FLASH_FILE, CONVERTED_FILE, PRUNED_FILE, BUILTIN_VAE)

    input: Name | None = Field(
        default=None, description="Decoder to judge: a file, folder, hf:// address or builtin:NAME."
    )
    compare: Names = Field(
        default=(), description="Further decoders of the same original, for more columns in the tables; repeatable."
    )
    num_clips: OptionalCount = Field(default=None, description="Judge at most this many clips.")
    num_frames: OptionalCount = Field(default=None, description="Judge at most this many frames of each clip.")
    chunk: Count | None = Field(
        default=None, description="Latent frames decoded at a time; bounds memory, changes no frame."
    )
    num_speed_rounds: Count = Field(
        default=5, description="Timed rounds of all decoders in alternation, after a warm-up."
    )
    speed_budget: OptionalPositive = Field(
        default=60.0,
        description="Seconds that timing may take: fewer rounds where they are slow, at least one. 0 sets no limit.",
    )
    pipeline_seconds: Positive | None = Field(
        default=None,
        description="Seconds that all other steps of your pipeline take (text encoder, denoising) for a clip of the "
        "timed size: also report what the decoder means for the whole. With --speed, of every size.",
    )
    speed: Switch = Field(
        default=False,
        description="Only time the decoders, on random latents, against the original eager and tuned; no clips.",
    )
    sizes: Sizes = Field(
        default=("256x256",),
        description=f"With --speed: frame sizes, by commas; {', '.join(NAMED_SIZES)} or WIDTHxHEIGHT.",
    )
    frames: Counts | None = Field(
        default=None,
        description="With --speed: frames per clip, by commas; rounded up to whole latents (1 + 4 n for Wan, 1 + 8 n "
        "for LTX). By default 9, and 1 where a decoder is one of single images.",
    )
    compile: Switch = Field(default=False, description="With --speed: compile the tuned decoders with torch.compile.")
    tile: Count | None = Field(
        default=None, description="Side in latents of the tiles that are decoded by themselves; changes no frame."
    )
    max_memory: Memory | None = Field(
        default=None, description="Choose chunk and tile so that every decoder stays below this, such as 4GB."
    )
    autotune: Switch = Field(
        default=False,
        description="With --speed: try layouts, operators, chunks (and --compile) first; remembered per machine.",
    )
    video: Switch = Field(default=True, description="Write a side-by-side MP4 (a PNG for single frames).")
    lpips: Literal["auto", "on", "off"] = Field(
        default="auto", description="auto reports LPIPS when the backbone's weights are there; on fails without them."
    )
    vmaf: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="auto reports VMAF where an ffmpeg with libvmaf is found (the package imageio-ffmpeg brings "
        "one); on fails without it.",
    )
    features: Name | None = Field(
        default=None,
        description="TorchScript network for a Fréchet distance over all clips, such as an I3D (FVD) or an Inception "
        "(FID). It is a program: give only files that you trust.",
    )
    features_input: Literal["clip", "image"] = Field(
        default="clip", description="What it takes: windows of frames, [N, 3, T, S, S], or images, [N, 3, S, S]."
    )
    features_frames: Count = Field(default=16, description="Frames per window.")
    features_size: Count = Field(default=224, description="Side S that frames are resized to.")
    features_range: Literal["signed", "unit", "bytes"] = Field(
        default="signed", description="Pixels that it takes: [-1, 1], [0, 1] or bytes."
    )
    center_crop: OptionalCount = Field(
        default=None, description="Resize each frame's shorter side to this many pixels, and judge the middle square."
    )
    protocol: Literal["ucf101", "davis", "panda"] | None = Field(
        default=None,
        description="Frames and crop of published tables, on a folder that you have: ucf101 and davis, 17 frames; "
        "panda, 33; all the middle 256 x 256.",
    )
    require: Names = Field(
        default=(),
        description="A condition such as psnr_retention>=0.969 or video.ssim>0.9; repeatable. Where one does not hold "
        "the exit code is 1.",
    )
    junit: Annotated[str, StringConstraints(pattern=r"\.xml$")] | None = Field(
        default=None, description="Also write the conditions as a JUnit file, whose name ends in .xml."
    )
    output: Name = Field(
        default="report", description="Folder to write report.json, report.md and pictures (speed.json, speed.md) to."
    )

    @model_validator(mode="after")
    def _speed_settings_need_speed(self) -> EvalRecipe:
        given = [name for name in _SPEED_ONLY if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.speed:
            listed = ", ".join(f"`{name}`" for name in given)
            raise ValueError(f"{listed}: only with --speed, which times decoders and judges no clip")
        judging = [name for name in _JUDGING_ONLY if getattr(self, name)]
        if judging and self.speed:
            listed = ", ".join(f"`{name}`" for name in judging)
            raise ValueError(f"{listed}: not with --speed, which times decoders and judges no clip")
        return self

    @model_validator(mode="before")
    @classmethod
    def _protocol_sets_frames_and_crop(cls, settings: object) -> object:
        protocol = settings.get("protocol") if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or protocol not in _PROTOCOLS:
            return settings
        num_frames, crop = _PROTOCOLS[protocol]
        for name, value in (("num_frames", num_frames), ("center_crop", crop)):
            if settings.get(name, value) != value:
                raise ValueError(f"`protocol` {protocol} has {name} {value}: leave `{name}` or `protocol` out")
        return {**settings, "num_frames": num_frames, "center_crop": crop}

    @model_validator(mode="after")
    def _crop_replaces_max_side(self) -> EvalRecipe:
        if self.center_crop is not None and self.max_side is not None:
            raise ValueError("`center_crop` resizes frames itself: leave `max_side` out")
        return self
