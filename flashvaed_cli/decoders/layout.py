"""Memory layout of a decoder: channels-last makes per-frame operators and 1x1 layers free of copies."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from flashvaed_cli.decoders.coder import Coder

CoderT = TypeVar("CoderT", bound=Coder)
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def use_channels_last(coder: CoderT) -> CoderT:
    """Lay the kernels of a decoder out channels-last, in place. Same frames up to rounding.

    Feed it latents from `channels_last`: every operator keeps the layout of its input.
    """
    for parameter in coder.parameters():
        if parameter.ndim in _FORMATS:
            parameter.data = parameter.data.contiguous(memory_format=_FORMATS[parameter.ndim])
    return coder


def channels_last(x: Tensor) -> Tensor:
    """A clip `[B, C, T, H, W]` or images `[B, C, H, W]` with channels innermost in memory."""
    return x.contiguous(memory_format=_FORMATS[x.ndim])
