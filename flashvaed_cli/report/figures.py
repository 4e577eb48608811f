"""The quality figures that a report shows: what each is called, how it is formatted, which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PSNR_CAP_DB = 100.0
"""The PSNR that identical frames count as, because JSON and means allow no infinity."""


@dataclass(frozen=True)
class Figure:
    """One figure of a decoder against a reference.

    Attributes:
        name: in JSON, in `--require`, and as an attribute of a quality result.
        label: for people; `{to}` becomes `to the video` or `to the original`.
        better: which way is better; `one`: near 1, like the reference.
        is_main: shown in the terminal too, where space is short.
    """

    name: str
    label: str
    number_format: str
    better: Literal["higher", "lower", "one"]
    is_main: bool = True


FIGURES: tuple[Figure, ...] = (
    Figure("psnr_db", "PSNR {to}, dB", ".2f", "higher"),
    Figure("ssim", "SSIM {to}", ".4f", "higher"),
    Figure("ms_ssim", "MS-SSIM {to}", ".4f", "higher", is_main=False),
    Figure("lpips", "LPIPS {to}", ".4f", "lower"),
    Figure("vmaf", "VMAF {to}", ".2f", "higher"),
    Figure("sharpness_ratio", "sharpness {to}", ".3f", "one"),
    Figure("flicker", "flicker {to}", ".4f", "lower"),
    Figure("border_flicker", "flicker at latent borders", ".4f", "lower", is_main=False),
    Figure("delta_e", "colour shift, Delta E", ".2f", "lower"),
    Figure("delta_e_95", "Delta E, 95th percentile", ".2f", "lower", is_main=False),
    Figure("first_frame_psnr_db", "first frame, dB", ".2f", "higher", is_main=False),
    Figure("worst_frame_psnr_db", "worst frame, dB", ".2f", "higher"),
)

RETENTION = ("psnr_db", "ssim", "sharpness_ratio")
"""Figures against the video that are also shown as a kept share of the original's."""


def short_name(name: str) -> str:
    """`psnr` of `psnr_db`, `sharpness` of `sharpness_ratio`: the word before `_retention`."""
    return name.removesuffix("_db").removesuffix("_ratio")
