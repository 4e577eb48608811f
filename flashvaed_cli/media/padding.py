"""Pad a clip to the sizes that a video VAE takes."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor


def pad_clip(
    clip: Shaped[Tensor, "*B T H W"], *, temporal_factor: int, spatial_factor: int
) -> Shaped[Tensor, "*B T2 H2 W2"]:
    """Pad to T2 = 1 + temporal_factor * k frames, and H2, W2 multiples of spatial_factor.

    The last frame, row and column are repeated (after, below, right), so existing pixels stay in place.

    Args:
        clip: every size at least 1; leading axes (batch, channels) are kept.
        temporal_factor, spatial_factor: what the VAE compresses by, at least 1.
    Returns:
        The padded clip; the input itself if it fits already.
    Raises:
        ValueError: an empty clip or a factor below 1.
    """
    num_frames, height, width = clip.shape[-3:]
    if min(num_frames, height, width, temporal_factor, spatial_factor) < 1:
        raise ValueError(f"cannot pad {list(clip.shape)} by factors {temporal_factor} and {spatial_factor}")
    sizes = (
        1 + _ceil_multiple(num_frames - 1, temporal_factor),
        _ceil_multiple(height, spatial_factor),
        _ceil_multiple(width, spatial_factor),
    )
    for dim, size in zip((-3, -2, -1), sizes, strict=True):
        have = clip.shape[dim]
        if size > have:
            index = torch.arange(size, device=clip.device).clamp_(max=have - 1)
            clip = clip.index_select(dim, index)
    return clip


def _ceil_multiple(size: int, factor: int) -> int:
    return -(-size // factor) * factor
