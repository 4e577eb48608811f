"""The bypass of a stage: its input, copied to the finer grid (or averaged to the coarser one) of its output.

Stateless: a frame's copies depend on that frame alone. See `BypassSpec` for the order of the channels.
Reference: the parameter-free shortcuts of Wan 2.2's VAE.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.operators import build_conv
from flashvaed_cli.decoders.spec.coders import BypassSpec

Clip = Float[Tensor, "B C T H W"]
MappedClip = Float[Tensor, "B O To Ho Wo"]


class Bypass(nn.Module):
    """Adds a stage's input to its output."""

    def __init__(self, spec: BypassSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.conv = None if spec.conv is None else build_conv(spec.conv, f"{address}.bypass")

    def forward(self, leaving: MappedClip, entering: Clip, *, is_first: bool) -> MappedClip:
        """The sum, written into `leaving` if no gradient needs it. `is_first`: the video begins with this chunk."""
        spec = self.spec
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or spec.kind == "average":
            return leaving + self.carried(entering, is_first=is_first)
        skipped = spec.temporal_factor - 1 if is_first else 0
        wide = entering if self.conv is None else self.conv(entering)
        channels = torch.arange(spec.out_width * spec.cell_size, device=entering.device)
        if self.conv is None:
            channels = channels // (len(channels) // spec.in_width)
        for s, at in enumerate(self._cell_positions()):
            t, i, j = at
            to = leaving[:, :, (t - skipped) % spec.temporal_factor :: spec.temporal_factor]
            frames = wide if t >= skipped else wide[:, :, 1:]
            to = to[..., i :: spec.spatial_factor, j :: spec.spatial_factor]
            to += frames.index_select(1, channels[s :: spec.cell_size])
        return leaving

    def _cell_positions(self) -> list[tuple[int, int, int]]:
        spec = self.spec
        side = range(spec.spatial_factor)
        return [(t, i, j) for t in range(spec.temporal_factor) for i in side for j in side]

    def wide(self, x: Clip) -> Float[Tensor, "B Cw T H W"]:
        """The output's channels at all positions of a cell, on the input's grid (`duplicate` only)."""
        if self.conv is not None:
            return self.conv(x)
        return x.repeat_interleave(self.spec.out_width * self.spec.cell_size // self.spec.in_width, dim=1)

    def matrix(self) -> tuple[Float[Tensor, "Cw C"], Float[Tensor, " Cw"]]:
        """The map from input to wide channels as weight and bias: the layer's, or ones where a channel is copied."""
        if self.conv is not None:
            return self.conv.weight, self.conv.bias
        copied = torch.eye(self.spec.in_width)[:, :, None, None, None]  # [C, C, 1, 1, 1]: a clip of one-hot channels
        weight = self.wide(copied)[..., 0, 0, 0].T
        return weight, weight.new_zeros(len(weight))

    def carried(self, x: Clip, *, is_first: bool) -> MappedClip:
        """The summand: the input on the output's grid."""
        spec = self.spec
        ft, fs = spec.temporal_factor, spec.spatial_factor
        if spec.kind == "duplicate":
            cells = self.wide(x).unflatten(1, (spec.out_width, ft, fs, fs))  # [B, O, t, i, j, T, H, W]
            y = cells.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
            return y[:, :, ft - 1 :] if is_first else y
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))  # frames missing before the first are zero
        cells = x.unflatten(4, (-1, fs)).unflatten(3, (-1, fs)).unflatten(2, (-1, ft))  # [B, C, T, t, H, i, W, j]
        wide = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return wide.unflatten(1, (spec.out_width, -1)).mean(2)
