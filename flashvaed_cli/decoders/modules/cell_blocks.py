"""Resamplers between channels and positions with copies of their input, in which a video's first frame has a cell of
its own: one of rows and columns alone.

Every block maps `(x, past, future)` to `y`, with the streaming contract of `operators.py`.

Reference: HunyuanVideo 1.5 VAE; DC-AE, arXiv 2410.10733, section 3.2 (residuals of moved channels).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.convolution import Future, Past
from flashvaed_cli.decoders.modules.operators import build_conv
from flashvaed_cli.decoders.modules.shuffle_blocks import cells_to_channels, channels_to_cells
from flashvaed_cli.decoders.spec.blocks import CellDownsampleSpec, CellUpsampleSpec
from flashvaed_cli.decoders.spec.layers import Factor

Clip = Float[Tensor, "B C T H W"]
MappedClip = Float[Tensor, "B O To Ho Wo"]


class CellUpsample(nn.Module):
    """`conv` plus copies of the input, whose channels then become frames, rows and columns; see `CellUpsampleSpec`."""

    def __init__(self, spec: CellUpsampleSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.conv = build_conv(spec.conv, f"{address}.conv")
        self.first = None if spec.first is None else build_conv(spec.first, f"{address}.first")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        spec = self.spec
        wide = self.conv(x, past, future)
        if past is not None or spec.factor[0] == 1:
            return channels_to_cells(self._with_copies(wide, x), spec.factor)
        first = channels_to_cells(self.first_frame(x[:, :, :1], wide[:, :, :1]), (1, *spec.factor[1:]))
        later = channels_to_cells(self._with_copies(wide, x), spec.factor)[:, :, spec.factor[0] :]
        return torch.cat([first, later], dim=2)

    def first_frame(self, x: Clip, wide: Float[Tensor, "B Cw T H W"]) -> Float[Tensor, "B Cf T H W"]:
        """The output of a video's first frame, before its channels move.

        Args:
            x: that frame of the input.
            wide: that frame of the layer's output.
        """
        spec = self.spec
        given = wide[:, :: spec.factor[0]]  # the channel at position ft * s of each cell
        if self.first is not None:
            return given + self.first(x)
        return given + copied_runs(x, spec.first_cell, spec.out_width) if spec.residual else given

    def _with_copies(self, wide: Float[Tensor, "B Cw T H W"], x: Clip) -> Float[Tensor, "B Cw T H W"]:
        """The layer's output plus the residual, in place if no gradient needs it."""
        spec = self.spec
        if not spec.residual:
            return wide
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or wide.dtype != x.dtype:
            return wide + copied_runs(x, spec.cell, spec.out_width)
        runs = _runs(x, spec.cell)  # [B, K, cell, T, H, W]
        wide.unflatten(1, (runs.shape[1], -1, spec.cell)).add_(runs[:, :, None])
        return wide


class CellDownsample(nn.Module):
    """`conv`, then cells of positions become channels; plus those of the input, averaged; see `CellDownsampleSpec`."""

    def __init__(self, spec: CellDownsampleSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.conv = build_conv(spec.conv, f"{address}.conv")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        factor = self.spec.factor
        y = self.conv(x, past, future)
        if past is not None or factor[0] == 1:
            return self._joined(y, x, factor)
        first = self._joined(y[:, :, :1], x[:, :, :1], (1, *factor[1:]))
        if x.shape[2] == 1:
            return first
        return torch.cat([first, self._joined(y[:, :, 1:], x[:, :, 1:], factor)], dim=2)

    def _joined(self, y: Float[Tensor, "B Cn T H W"], x: Clip, factor: Factor) -> MappedClip:
        """Cells of both, added; those of the layer are repeated up to the output's width."""
        moved, own = _cells_to_runs(y, factor), _cells_to_runs(x, factor)
        width = self.spec.out_width
        return moved.repeat(1, width // moved.shape[1], 1, 1, 1) + own.unflatten(1, (width, -1)).mean(dim=2)


def copied_runs(x: Clip, num_positions: int, out_width: int) -> Float[Tensor, "B Cw T H W"]:
    """Copies of the input for an output of `out_width` channels, all positions of a channel together.

    Channel c at position p is that of run p, of which there is one for each position, at c // n: each is taken n times.
    """
    runs = _runs(x, num_positions)
    return runs.repeat_interleave(out_width // runs.shape[1], dim=1).flatten(1, 2)


def _runs(x: Clip, num_positions: int) -> Float[Tensor, "B K P T H W"]:
    """The input's channels as so many runs of K channels each."""
    return x.unflatten(1, (num_positions, -1)).transpose(1, 2)


def _cells_to_runs(x: Clip, factor: Factor) -> MappedClip:
    """Cells as channels: all channels of one position before those of the next."""
    wide = cells_to_channels(x, factor)
    return wide.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1, 2)
