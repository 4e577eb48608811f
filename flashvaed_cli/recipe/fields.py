"""The kinds of values that recipes hold: named choices, checked numbers, default file names."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from flashvaed_cli.recipe.quantities import parse_bucket, parse_memory, parse_ratio, parse_size

BUILTIN_VAE = "builtin:tiny-wan"

ANALYSIS_FILE = "analysis.safetensors"
PRUNED_FILE = "pruned.safetensors"
CONVERTED_FILE = "converted.safetensors"
FLASH_FILE = "flash.safetensors"

DEFAULT_KEEP_RATIO = 0.25

FloatFormat = Literal["float32", "bfloat16", "float16"]
SelectionRule = Literal["greedy-r2", "greedy-energy", "next-layer", "pivoted-qr", "chip", "l1", "variance", "random"]
ReconstructMode = Literal["none", "channel", "full"]
StudentLayout = Literal["free", "native"]
StudentShape = Literal["tae", "temporal-tae", "efficientvit", "lean"]
StudentStart = Literal["random", "least-squares"]
OperatorProfile = Literal["paper", "exact", "image"]
StageOperator = Literal["causal3d", "dwsep3d", "frame2d"]
PhaseChoice = Literal["1", "2", "3", "all"]
ExportTarget = Literal["safetensors", "diffusers", "onnx", "comfyui", "pt2", "aoti"]
LatentScale = Literal["normalized", "raw"]
"""`normalized`: as diffusion models use latents; `raw`: normalized * std + mean, as the VAE uses them."""
FrameFormat = Literal["mp4", "png", "npy", "pt"]


def one_as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _zero_as_none(value: object) -> object:
    return None if value == 0 and not isinstance(value, bool) else value


def int_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _split_at_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _counts_from_text(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    parts = _split_at_commas(value)
    if not isinstance(value, str) or not isinstance(parts, tuple):
        return parts
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _bucket_from_text(value: object) -> object:
    return parse_bucket(value) if isinstance(value, str) else value


def _checked_size(text: str) -> str:
    parse_size(text)
    return text


def _checked_device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|gpu|cuda(:[0-9]{1,3})?", text) is None:
        hint = "a GPU is called gpu, cuda (NVIDIA, AMD) or mps (Apple); " if "gpu" in text.lower() else ""
        raise ValueError(
            f"{text!r} is not a device: {hint}give auto, cpu, gpu, cuda, mps, or cuda:1 for the second GPU"
        )
    return text


_SHORT_FORMATS = {
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    "bf16": "bfloat16",
}


def _full_format(value: object) -> object:
    return _SHORT_FORMATS.get(value, value) if isinstance(value, str) else value


def _ratio_from_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_ratio(value)
    except ValueError:
        return value  # the number check will name it


def _checked_memory(text: str) -> str:
    parse_memory(text)
    return text


# Strict numbers: YAML's `yes` and `"8"` are mistakes here, not 1 and 8.
Count = Annotated[int, Field(gt=0, strict=True)]
OptionalCount = Annotated[Annotated[int, Field(gt=0, strict=True)] | None, BeforeValidator(_zero_as_none)]
WholeNumber = Annotated[int, Field(ge=0, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True)]
OptionalPositive = Annotated[Annotated[float, Field(gt=0, strict=True)] | None, BeforeValidator(_zero_as_none)]
NonNegative = Annotated[float, Field(ge=0, strict=True)]
KeepRatio = Annotated[Annotated[float, Field(gt=0, le=1, strict=True)], BeforeValidator(_ratio_from_text)]
DType = Annotated[FloatFormat, BeforeValidator(_full_format)]
CacheDType = Annotated[Literal["float32", "float16"], BeforeValidator(_full_format)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(one_as_tuple)]
Sizes = Annotated[
    tuple[Annotated[str, AfterValidator(_checked_size)], ...], BeforeValidator(_split_at_commas), Field(min_length=1)
]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_counts_from_text), Field(min_length=1)]
Bucket = Annotated[tuple[Count, Count, Count], BeforeValidator(_bucket_from_text)]
Buckets = Annotated[tuple[Bucket, ...], BeforeValidator(one_as_tuple)]
Memory = Annotated[str, AfterValidator(_checked_memory)]
Device = Annotated[str, AfterValidator(_checked_device)]
