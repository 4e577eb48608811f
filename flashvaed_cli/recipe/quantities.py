"""Sizes and amounts as people write them: `480p`, `832x480`, `17x128x128`, `4GB`, `30000/1001`."""

from __future__ import annotations

import re
from fractions import Fraction

NAMED_SIZES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1080, 1920)}
"""Height and width in pixels by name."""

_MAX_FRAME_RATE = 1000
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of `480p` or `WIDTHxHEIGHT`.

    Raises:
        ValueError: neither.
    """
    if text in NAMED_SIZES:
        return NAMED_SIZES[text]
    match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text)
    if match is None:
        raise ValueError(f"must be {', '.join(NAMED_SIZES)} or WIDTHxHEIGHT, such as 832x480")
    return int(match[2]), int(match[1])


def parse_bucket(text: str) -> tuple[int, int, int]:
    """Frames, height and width of `FRAMESxHEIGHTxWIDTH`.

    Raises:
        ValueError: something else.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text.strip())
    if match is None:
        raise ValueError("must be FRAMESxHEIGHTxWIDTH, such as 17x128x128")
    return int(match[1]), int(match[2]), int(match[3])


def parse_memory(text: str) -> int:
    """Bytes of `4GB`, `512MiB` or `1000000`.

    Raises:
        ValueError: no positive amount.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = None if match is None else _UNITS.get(match[2])
    num_bytes = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if num_bytes < 1:
        raise ValueError("must be an amount of memory, such as 4GB or 512MiB")
    return num_bytes


def parse_ratio(text: str) -> float:
    """The number of `0.25`, `1/8` or `25%`.

    Raises:
        ValueError: none of them.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is not None and int(match[2]):
        return int(match[1]) / int(match[2])
    if match is None and text.strip().endswith("%"):
        return float(text.strip()[:-1]) / 100
    if match is None:
        return float(text)
    raise ValueError("must be a ratio above 0 and up to 1, such as 0.125, 1/8 or 12.5%")


def parse_frame_rate(text: str) -> Fraction:
    """Frames per second of `24`, `23.976` or `30000/1001`.

    Raises:
        ValueError: no rate above 0, up to 1000.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})|\d{1,4}(?:\.\d{1,6})?", text.strip())
    if match is not None and match[2] is not None:
        rate = Fraction(int(match[1]), int(match[2])) if int(match[2]) else Fraction(0)
    else:
        rate = Fraction(0 if match is None else match[0]).limit_denominator(1001)
    if not 0 < rate <= _MAX_FRAME_RATE:
        raise ValueError("must be a rate above 0 and up to 1000, such as 24, 23.976 or 30000/1001")
    return rate
