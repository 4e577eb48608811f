"""Image measures shared by metrics and losses: luma, its Laplacian, the SSIM window. All differentiable."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

LUMA_WEIGHTS = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""From Wang, Bovik, Sheikh and Simoncelli 2004."""
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def luma(images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 1 H W"]:
    """BT.709 luma of RGB images, in the same range."""
    weights = torch.tensor(LUMA_WEIGHTS, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def laplacian(planes: Float[Tensor, "N 1 H W"]) -> Float[Tensor, "N 1 H-2 W-2"]:
    """The 4-neighbour Laplacian, borders left out; sides of 3 or more."""
    kernel = torch.tensor(_LAPLACIAN, device=planes.device, dtype=planes.dtype)
    return functional.conv2d(planes, kernel[None, None])


def gaussian_window(size: int, like: Tensor) -> Float[Tensor, " size"]:
    """Weights of SSIM's window in one direction, which sum to 1; on the device and in the dtype of `like`."""
    offsets = torch.arange(size, device=like.device, dtype=like.dtype) - (size - 1) / 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    return window / window.sum()
