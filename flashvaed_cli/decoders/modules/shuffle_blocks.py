"""Resamplers between channels and positions: cells of frames, rows and columns become channels, or come from them.

Every block maps `(x, past, future)` to `y`, with the streaming contract of `operators.py`. The first chunk of a video
(`past` is None) holds 1 + n frames, of which the first stands for a whole cell in time.

Reference: LTX-Video, arXiv 2501.00103, section 2.1 (causal VAE).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.convolution import Future, Past, extend_with_past, space_window, time_window
from flashvaed_cli.decoders.modules.operators import build_conv
from flashvaed_cli.decoders.spec.blocks import ShuffleUpsampleSpec, StridedDownsampleSpec, UnshuffleDownsampleSpec
from flashvaed_cli.decoders.spec.layers import Factor

Clip = Float[Tensor, "B C T H W"]
MappedClip = Float[Tensor, "B O To Ho Wo"]


class ShuffleUpsample(nn.Module):
    """`conv`, then its channels become frames, rows and columns; with `residual` the input's too, and are added."""

    def __init__(self, spec: ShuffleUpsampleSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.conv = build_conv(spec.conv, f"{address}.conv")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        factor = self.spec.factor
        is_first = past is None and factor[0] > 1  # the first frame of a video yields one frame only
        y = channels_to_cells(self.conv(x, past, future), factor)
        y = self._without_surplus(y) if is_first else y
        if not self.spec.residual:
            return y
        own = channels_to_cells(x, factor)
        own = self._without_surplus(own) if is_first else own
        return y + own.repeat(1, y.shape[1] // own.shape[1], 1, 1, 1)

    def _without_surplus(self, y: Clip) -> MappedClip:
        """One frame for a video's first."""
        frames = self.spec.factor[0]
        if self.spec.keeps == "last":
            return y[:, :, frames - 1 :]
        return torch.cat([y[:, :, :1], y[:, :, frames:]], dim=2)


class StridedDownsample(nn.Module):
    """`conv` with a stride; a later chunk needs fewer past frames than its kernel has, by the stride less one."""

    def __init__(self, spec: StridedDownsampleSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.conv = build_conv(spec.conv, f"{address}.conv")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        window = self._time_window(x, past, future)
        if self.spec.pads_after:
            window, margins = F.pad(window, (0, 1, 0, 1)), (0, 0)
        else:
            window, margins = space_window(window, self.spec.conv)
        return F.conv3d(window, self.conv.weight, self.conv.bias, stride=self.spec.factor, padding=(0, *margins))

    def _time_window(self, x: Clip, past: Past, future: Future) -> MappedClip:
        spec = self.spec.conv
        if spec.num_ahead:
            return time_window(x, spec, self.conv.address)
        num_past = spec.num_past if past is None else spec.num_past - self.spec.factor[0] + 1
        if future is not None:
            future[self.conv.address] = x[:, :, x.shape[2] - spec.num_past + self.spec.factor[0] - 1 :].clone()
        return extend_with_past(x, num_past, self.conv.address, past, None, spec.time_padding)


class UnshuffleDownsample(nn.Module):
    """`conv`, then cells of positions become channels; plus those of the input, averaged to as many channels."""

    def __init__(self, spec: UnshuffleDownsampleSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.conv = build_conv(spec.conv, f"{address}.conv")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        factor = self.spec.factor
        if past is None and factor[0] > 1:
            x = torch.cat([x[:, :, :1].expand(-1, -1, factor[0] - 1, -1, -1), x], dim=2)
        y = cells_to_channels(self.conv(x, past, future), factor)
        own = cells_to_channels(x, factor)
        return y + own.unflatten(1, (y.shape[1], -1)).mean(dim=2)


def channels_to_cells(x: Clip, factor: Factor) -> MappedClip:
    """`[B, C ft fh fw, T, H, W]` to `[B, C, T ft, H fh, W fw]`."""
    ft, fh, fw = factor
    b, _, t, h, w = x.shape
    cells = x.unflatten(1, (-1, ft, fh, fw))  # [B, C, ft, fh, fw, T, H, W]
    return cells.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, cells.shape[1], t * ft, h * fh, w * fw)


def cells_to_channels(x: Clip, factor: Factor) -> MappedClip:
    """`[B, C, T ft, H fh, W fw]` to `[B, C ft fh fw, T, H, W]`: undoes `channels_to_cells`."""
    ft, fh, fw = factor
    cells = x.unflatten(4, (-1, fw)).unflatten(3, (-1, fh)).unflatten(2, (-1, ft))  # [B, C, T, ft, H, fh, W, fw]
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
