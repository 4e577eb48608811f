"""Grow a clip to the sizes a video VAE takes, and cut its output back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """The clip's size before padding: all that is needed to undo it."""

    num_frames: int
    height: int
    width: int


def pad_clip(
    clip: Shaped[Tensor, "*B T H W"], *, temporal_factor: int, spatial_factor: int
) -> tuple[Shaped[Tensor, "*B T2 H2 W2"], Padding]:
    """Pad to T2 = 1 + temporal_factor * k frames, and H2, W2 multiples of spatial_factor.

    The last frame, row and column are repeated (after, below, right), so nothing before them moves.

    Args:
        clip: every size at least 1; leading axes (batch, channels) are kept.
        temporal_factor, spatial_factor: what the VAE compresses by, at least 1.
    Returns:
        The padded clip (the input itself where nothing is missing) and its original size.
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
    return clip, Padding(num_frames=num_frames, height=height, width=width)


def crop_clip(
    clip: Shaped[Tensor, "*B T2 H2 W2"], padding: Padding, *, first_frame: int = 0
) -> Shaped[Tensor, "*B T H W"]:
    """Undo `pad_clip`, on the whole clip or on one chunk of it.

    Args:
        first_frame: index of the chunk's first frame in the padded clip; a chunk of padding only
            comes back with no frame.
    Raises:
        ValueError: the clip is smaller than the size to cut it to.
    """
    height, width = clip.shape[-2:]
    if height < padding.height or width < padding.width:
        raise ValueError(f"frames of {height}x{width} cannot be cut to {padding.height}x{padding.width}")
    num_frames = max(0, padding.num_frames - first_frame)
    return clip[..., :num_frames, : padding.height, : padding.width]


def _ceil_multiple(size: int, factor: int) -> int:
    return -(-size // factor) * factor
