"""Animated WebP and PNG, read with Pillow: FFmpeg does not read them, or only their first frame."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageSequence

from flashvaed_cli.errors import MediaError

_SUFFIXES = (".webp", ".png", ".apng")
_HEAD_BYTES = 65_536
_WEBP_HAS_ANIMATION = 0x02
_DEFAULT_MS = 100


def is_animation(path: Path) -> bool:
    """Whether a WebP or PNG file announces, before its first picture, that it has several."""
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        return bool(head[20] & _WEBP_HAS_ANIMATION) if len(head) > 20 else False
    return head[:4] == b"\x89PNG" and b"acTL" in head.partition(b"IDAT")[0]


def animation_size(path: Path) -> tuple[int, Fraction]:
    """Number of frames, and frames per second by the first one's duration.

    Raises:
        MediaError: damaged.
    """
    with _opened(path) as image:
        num_frames = getattr(image, "n_frames", 1)
        image.load()
        milliseconds = image.info.get("duration") or _DEFAULT_MS
    return num_frames, Fraction(1000) / Fraction(milliseconds).limit_denominator(1000)


def animation_frames(path: Path) -> Iterator[av.VideoFrame]:
    """The frames as shown one after another, without transparency.

    Raises:
        MediaError: damaged, at the first frame that is.
    """
    with _opened(path) as image:
        for frame in _guarded(path, ImageSequence.Iterator(image)):
            yield av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.convert("RGB")), format="rgb24")


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(path)
        except _ERRORS as error:
            raise _damaged(path, error) from error


def _guarded(path: Path, frames: Iterator[Image.Image]) -> Iterator[Image.Image]:
    while True:
        try:
            frame = next(frames, None)
            if frame is None:
                return
            frame.load()
        except _ERRORS as error:
            raise _damaged(path, error) from error
        yield frame


_ERRORS = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, Image.DecompressionBombError)


def _damaged(path: Path, error: Exception) -> MediaError:
    return MediaError(f"{path} is damaged or cut off ({error!s:.120}). Download or export it again, or leave it out.")
