"""Frames as 8-bit pixels."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_pixels(frames: Float[Tensor, "C T H W"], first: int = 0) -> UInt8[np.ndarray, "T H W C"]:
    """RGB frames in [-1, 1] as bytes, rounded; values outside are clipped.

    Args:
        first: number of the first frame, for messages.
    Raises:
        ValueError: not three channels, or NaN or infinite values.
    """
    if frames.shape[0] != 3:
        raise ValueError(f"frames are [3, T, H, W], not {list(frames.shape)}")
    if not torch.isfinite(frames).all():
        raise ValueError(f"frames from number {first} on hold NaN or infinite values")
    pixels = frames.detach().to("cpu", torch.float32).add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().numpy()
