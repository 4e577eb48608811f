"""SSIM and MS-SSIM of frames in [-1, 1], by separable filters: torchmetrics' values, in less time.

A Gaussian window, 11 wide, sigma 1.5, on each colour channel; K1 = 0.01, K2 = 0.03. Borders are mirrored; they count
in scores that include luminance, while contrast alone is averaged without them.

Reference: Wang, Bovik, Sheikh and Simoncelli 2004, Image quality assessment; Wang, Simoncelli and Bovik 2003,
Multiscale structural similarity.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from flashvaed_cli.numerics.images import SSIM_WINDOW, gaussian_window

MS_SSIM_MIN_SIDE = (SSIM_WINDOW - 1) * 2**4 + 1
_BORDER = SSIM_WINDOW // 2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_C1, _C2 = 0.01**2, 0.03**2


def ssim_per_frame(output: Float[Tensor, "N C H W"], reference: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    """Structural similarity; sides of 11 or more."""
    luminance, contrast = _similarities((output + 1) / 2, (reference + 1) / 2)
    return (luminance * contrast).mean(dim=(1, 2, 3))


def ms_ssim_per_frame(output: Float[Tensor, "N C H W"], reference: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    """Contrast and structure at five scales times luminance at the last, negative ones taken as 0; sides of
    `MS_SSIM_MIN_SIDE` or more."""
    x, y = (output + 1) / 2, (reference + 1) / 2
    product = torch.ones(len(x), device=x.device)
    for scale, weight in enumerate(_SCALE_WEIGHTS):
        luminance, contrast = _similarities(x, y)
        if scale == len(_SCALE_WEIGHTS) - 1:
            mean = (luminance * contrast).mean(dim=(1, 2, 3))
        else:
            mean = contrast[..., _BORDER:-_BORDER, _BORDER:-_BORDER].mean(dim=(1, 2, 3))
            x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
        product = product * mean.relu() ** weight
    return product


def _similarities(x: Float[Tensor, "N C H W"], y: Float[Tensor, "N C H W"]) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, at every pixel."""
    n, c, height, width = x.shape
    maps = torch.cat([x, y, x * x, y * y, x * y]).reshape(1, 5 * n * c, height, width)
    mean_x, mean_y, square_x, square_y, both = _blurred(maps).view(5, n, c, height, width).unbind()
    product = mean_x * mean_y
    mean_x, mean_y = mean_x.square(), mean_y.square()
    spread = (square_x - mean_x).clamp_min(0) + (square_y - mean_y).clamp_min(0)
    luminance = (2 * product + _C1) / (mean_x + mean_y + _C1)
    return luminance, (2 * (both - product) + _C2) / (spread + _C2)


def _blurred(maps: Float[Tensor, "1 M H W"]) -> Float[Tensor, "1 M H W"]:
    window = gaussian_window(SSIM_WINDOW, maps)
    padded = functional.pad(maps, (_BORDER, _BORDER, _BORDER, _BORDER), mode="reflect")
    count = maps.shape[1]  # as channels: convolving many single-channel maps is three times slower
    rows = functional.conv2d(padded, window.view(1, 1, -1, 1).expand(count, 1, -1, 1), groups=count)
    return functional.conv2d(rows, window.view(1, 1, 1, -1).expand(count, 1, 1, -1), groups=count)
