"""How far colours are from those of a reference, as perceived: CIEDE2000.

Pixels in [-1, 1] are taken as sRGB under D65. A difference of 1 is just noticeable side by side; a constant shift of a
whole picture becomes visible at about 2.

Reference: Sharma, Wu and Dalal 2005, The CIEDE2000 color-difference formula; IEC 61966-2-1 (sRGB).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_SRGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_WHITE = (0.95047, 1.0, 1.08883)
_LARGEST = 100.0
_BINS_PER_UNIT = 50


class ColourShift:
    """Mean and 95th percentile of Delta E 2000, frame by frame, in constant memory.

    Only every second pixel of every second row is used: a colour shift does not hide in single pixels.
    """

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0
        self._histogram = torch.zeros(int(_LARGEST) * _BINS_PER_UNIT, dtype=torch.float64)

    def add(self, output: Float[Tensor, "N 3 H W"], reference: Float[Tensor, "N 3 H W"]) -> None:
        """Add frames in [-1, 1]."""
        one, other = (srgb_to_lab(frames[..., ::2, ::2]) for frames in (output, reference))
        difference = delta_e_2000(one, other).cpu()
        self._total += float(difference.double().sum())
        self._count += difference.numel()
        self._histogram += torch.histc(difference.clamp(max=_LARGEST), len(self._histogram), 0, _LARGEST).double()

    @property
    def mean(self) -> float | None:
        """None before the first frame."""
        return self._total / self._count if self._count else None

    @property
    def percentile_95(self) -> float | None:
        """Interpolated, to 0.02; None before the first frame. A NaN among the pixels makes it NaN."""
        if not self._count or not math.isfinite(self._total):
            return math.nan if self._count else None
        share = self._histogram.cumsum(0) / self._count
        index = int(torch.searchsorted(share, torch.tensor(0.95, dtype=torch.float64)))
        below = float(share[index - 1]) if index else 0.0
        inside = (0.95 - below) / max(float(share[index]) - below, 1e-12)
        return 0.0 if self._total == 0 else (index + inside) / _BINS_PER_UNIT


def srgb_to_lab(frames: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """CIE L*a*b* of sRGB pixels in [-1, 1]."""
    coded = (frames.float() + 1) / 2
    linear = torch.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055).clamp_min(0) ** 2.4)
    matrix = torch.tensor(_SRGB_TO_XYZ, device=frames.device) / torch.tensor(_WHITE, device=frames.device)[:, None]
    xyz = torch.einsum("dc,nchw->ndhw", matrix, linear)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def delta_e_2000(one: Float[Tensor, "N 3 ..."], other: Float[Tensor, "N 3 ..."]) -> Float[Tensor, "N ..."]:
    """CIEDE2000 of L*a*b* values, with all three parametric weights 1."""
    (light_1, a_1, b_1), (light_2, a_2, b_2) = one.unbind(1), other.unbind(1)
    chroma = (torch.hypot(a_1, b_1) + torch.hypot(a_2, b_2)) / 2
    stretch = 1.5 - 0.5 * _share_of_25(chroma)
    a_1, a_2 = a_1 * stretch, a_2 * stretch
    chroma_1, chroma_2 = torch.hypot(a_1, b_1), torch.hypot(a_2, b_2)
    hue_1, hue_2 = (torch.atan2(b, a) % (2 * math.pi) for a, b in ((a_1, b_1), (a_2, b_2)))
    has_hue = chroma_1 * chroma_2 > 0
    turn = hue_2 - hue_1
    far = turn.abs() > math.pi
    turn = torch.where(far, turn - 2 * math.pi * turn.sign(), turn) * has_hue
    hue = torch.where(far & has_hue, (hue_1 + hue_2 + 2 * math.pi) / 2 % (2 * math.pi), (hue_1 + hue_2) / 2)
    hue = torch.where(has_hue, hue, hue_1 + hue_2)
    light, chroma = (light_1 + light_2) / 2, (chroma_1 + chroma_2) / 2
    by_light = 1 + 0.015 * (light - 50) ** 2 / torch.sqrt(20 + (light - 50) ** 2)
    by_hue = 1 + 0.015 * chroma * _hue_weight(hue)
    d_light = (light_2 - light_1) / by_light
    d_chroma = (chroma_2 - chroma_1) / (1 + 0.045 * chroma)
    d_hue = 2 * torch.sqrt(chroma_1 * chroma_2) * torch.sin(turn / 2) / by_hue
    blue = math.radians(60) * torch.exp(-(((torch.rad2deg(hue) - 275) / 25) ** 2))
    rotation = -2 * _share_of_25(chroma) * torch.sin(blue)
    return torch.sqrt((d_light**2 + d_chroma**2 + d_hue**2 + rotation * d_chroma * d_hue).clamp_min(0))


def _share_of_25(chroma: Tensor) -> Tensor:
    seventh = chroma**7
    return torch.sqrt(seventh / (seventh + 25.0**7))


def _hue_weight(hue: Tensor) -> Tensor:
    return (
        1
        - 0.17 * torch.cos(hue - math.radians(30))
        + 0.24 * torch.cos(2 * hue)
        + 0.32 * torch.cos(3 * hue + math.radians(6))
        - 0.20 * torch.cos(4 * hue - math.radians(63))
    )
