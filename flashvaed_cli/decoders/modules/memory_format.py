"""Memory layout of a decoder: channels-last spares per-frame operators and 1x1 layers their copies."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def use_channels_last(model: ModuleT) -> ModuleT:
    """Lay out the kernels of a decoder, or of a part of one, channels-last, in place. Same frames up to rounding.

    Feed it latents from `channels_last`: every operator keeps the layout of its input.
    """
    for parameter in model.parameters():
        if parameter.ndim in _FORMATS:
            parameter.data = parameter.data.contiguous(memory_format=_FORMATS[parameter.ndim])
    return model


def channels_last(x: Tensor) -> Tensor:
    """A clip `[B, C, T, H, W]` or images `[B, C, H, W]` with channels innermost in memory."""
    return x.contiguous(memory_format=_FORMATS[x.ndim])
