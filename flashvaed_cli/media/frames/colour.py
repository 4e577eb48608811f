"""From decoded frames to the RGB bytes that an SDR screen shows, HDR and wide colours included.

PQ and HLG frames become light in cd/m2 (SMPTE ST 2084; ARIB STD-B67 with its system gamma 1.2 for 1000 cd/m2). The
brightest of R, G and B is brought from a mastering peak of 1000 cd/m2 to 203, the white of graphics in HDR (BT.2408),
by the curve of Report BT.2390: unchanged up to 92 cd/m2, a Hermite spline above it; the other two keep their ratio to
it. Then BT.2020 (or P3) primaries become those of BT.709, and the sRGB curve gives the bytes.
"""

from __future__ import annotations

from functools import lru_cache

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace, Interpolation
from jaxtyping import UInt8
from torch import Tensor

SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

_HD_MIN_HEIGHT = 577  # untagged files taller than this are BT.709, others BT.601, as players assume
_UNSPECIFIED = 2
_PQ, _HLG = 16, 18  # of AVColorTransferCharacteristic
_BT2020, _P3 = 9, 12  # of AVColorPrimaries
_MASTER_PEAK, _WHITE = 1000.0, 203.0  # cd/m2
_HLG_GAMMA = 1.2
_LEVELS = 65_536

_TO_BT709 = {
    _BT2020: np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]),
    _P3: np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]),
}
_BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)


def tone_mapping(frame: av.VideoFrame) -> str | None:
    """How the colours of a frame are changed for an SDR screen, in words; None for SDR in ordinary colours."""
    transfer = {_PQ: "HDR (PQ)", _HLG: "HDR (HLG)"}.get(int(frame.color_trc))
    primaries = {_BT2020: "BT.2020", _P3: "P3"}.get(_primaries(frame))
    if transfer is not None:
        return (
            f"{transfer}, tone-mapped to SDR by the curve of BT.2390 (1000 to 203 cd/m2)"
            + (f", {primaries} colours to BT.709" if primaries else "")
        )  # fmt: skip
    return f"wide colours ({primaries}), brought to BT.709" if primaries else None


def to_rgb(frame: av.VideoFrame, height: int, width: int) -> UInt8[Tensor, "3 H W"]:
    """Convert, scale to the stored height and width, then rotate as the metadata say."""
    colorspace = None  # the frame's own
    if int(frame.colorspace) == _UNSPECIFIED:
        colorspace = Colorspace.ITU709 if frame.height >= _HD_MIN_HEIGHT else Colorspace.ITU601
    mapped = tone_mapping(frame) is not None
    pixels = frame.reformat(
        width=width,
        height=height,
        format="rgb48le" if mapped else "rgb24",
        src_colorspace=colorspace,
        interpolation=SCALER,
    ).to_ndarray()  # [H, W, 3]
    if mapped:
        pixels = _as_sdr(pixels, int(frame.color_trc), _primaries(frame))
    turned = np.rot90(pixels, quarter_turns(frame))
    return torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 0, 1)))


def quarter_turns(frame: av.VideoFrame) -> int:
    """How many times to rotate the stored picture by 90 degrees counter-clockwise: 0 to 3.

    Only `rotation` is read: in PyAV 18 `frame.side_data`, which also knows about mirroring, frees memory
    twice on frames that carry a kind of side data newer than itself (EXIF of photographs).
    """
    return round(frame.rotation / 90) % 4


def displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width after rotation."""
    return (frame.width, frame.height) if quarter_turns(frame) % 2 else (frame.height, frame.width)


def _primaries(frame: av.VideoFrame) -> int:
    """As tagged; untagged HDR is taken as BT.2020, as players do."""
    primaries = int(frame.color_primaries)
    is_hdr = int(frame.color_trc) in (_PQ, _HLG)
    return _BT2020 if primaries == _UNSPECIFIED and is_hdr else primaries


def _as_sdr(codes: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """16-bit codes to 8-bit sRGB, both `[H, W, 3]`."""
    light = _light_table(transfer)[codes]  # white is 1
    if transfer == _HLG:
        light = light * ((light @ _BT2020_LUMINANCE) ** (_HLG_GAMMA - 1))[..., None] * (_MASTER_PEAK / _WHITE)
    if transfer in (_PQ, _HLG):
        light = _compressed(light)
    if primaries in _TO_BT709:
        light = light @ _TO_BT709[primaries].T.astype(np.float32)
    return _srgb_table()[(light.clip(0.0, 1.0) * (_LEVELS - 1)).astype(np.uint16)]


def _compressed(light: np.ndarray) -> np.ndarray:
    brightest = light.max(axis=-1, keepdims=True)
    places = (brightest * (_WHITE / _MASTER_PEAK)).clip(0.0, 1.0) ** 0.25 * (_LEVELS - 1)  # finer in the dark
    return light * _gain_table()[places.astype(np.uint16)]


@lru_cache
def _light_table(transfer: int) -> np.ndarray:
    """Light by 16-bit code, in units of SDR white; for HLG, scene light up to 1."""
    code = np.linspace(0.0, 1.0, _LEVELS)
    if transfer == _PQ:
        light = _from_pq(code) / _WHITE
    elif transfer == _HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    else:
        light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@lru_cache
def _gain_table() -> np.ndarray:
    """What the curve of BT.2390 multiplies light by; see `_compressed` for the places."""
    light = np.linspace(0.0, 1.0, _LEVELS) ** 4 * _MASTER_PEAK
    source_peak, target_peak = _to_pq(np.array([_MASTER_PEAK, _WHITE]))
    top = target_peak / source_peak
    knee = 1.5 * top - 0.5
    given = _to_pq(light) / source_peak
    t = ((given - knee) / (1 - knee)).clip(0.0, 1.0)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    mapped = _from_pq(np.where(given < knee, given, spline) * source_peak)
    return np.where(given < knee, 1.0, mapped / np.maximum(light, 1e-9)).astype(np.float32)


@lru_cache
def _srgb_table() -> np.ndarray:
    light = np.linspace(0.0, 1.0, _LEVELS)
    code = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return (code * 255).round().astype(np.uint8)


def _from_pq(code: np.ndarray) -> np.ndarray:
    """Code in [0, 1] to cd/m2."""
    power = code ** (1 / 78.84375)
    return 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def _to_pq(light: np.ndarray) -> np.ndarray:
    power = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
