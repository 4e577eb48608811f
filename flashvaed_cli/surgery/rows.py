"""Rows of a least-squares problem: output values and the input patches that they come from, at sampled positions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.decoders.spec.layers import Kernel, SpacePadding, TimePadding

_GRAM_MULTIPLY_ADDS = 5e9
_FEWEST_ROWS_PER_UNKNOWN, _MOST_ROWS_PER_UNKNOWN = 8, 128
_HELD_ELEMENTS = 1 << 27
_EQUATIONS_PER_UNKNOWN = 128


def dense_rows_per_clip(num_features: int, num_clips: int) -> int:
    """Number of positions of a clip to use for a dense layer, whose rows are summed up.

    As many as 5e9 multiply-adds for the gram allow, but over all clips at least 8 and at most 128 per unknown.
    """
    affordable = int(_GRAM_MULTIPLY_ADDS / num_features**2)
    fewest, most = (-(-n * (num_features + 1) // num_clips) for n in (_FEWEST_ROWS_PER_UNKNOWN, _MOST_ROWS_PER_UNKNOWN))
    return min(max(affordable, fewest), most)


def separable_rows_per_clip(num_channels: int, num_taps: int, num_outputs: int, num_clips: int) -> int:
    """Number of positions of a clip to use for a depthwise-separable layer, whose rows are held in memory.

    128 equations per unknown in all, but at most 2^27 held values (512 MiB), and at least 8 rows per channel.
    """
    wanted = _EQUATIONS_PER_UNKNOWN * num_channels * (num_taps + num_outputs) // num_outputs
    held = _HELD_ELEMENTS // (num_channels * num_taps)
    rows = max(min(wanted, held), _FEWEST_ROWS_PER_UNKNOWN * (num_channels + 1))
    return -(-rows // num_clips)


def sample_positions(
    shape: tuple[int, int, int, int], max_rows: int, generator: torch.Generator
) -> Int64[Tensor, " N"]:
    """Flat indices into `[B, T, H, W]`: all of them if they fit, else a random subset, ascending."""
    total = shape[0] * shape[1] * shape[2] * shape[3]
    if total <= max_rows:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:max_rows].sort().values


def gather_patches(
    x: Float[Tensor, "B C T H W"],
    kernel: Kernel,
    positions: Int64[Tensor, " N"],
    time_padding: TimePadding = "zeros",
    space_padding: SpacePadding = "zeros",
) -> Float[Tensor, "N C taps"]:
    """The values that a kernel reads at each position.

    Flattened, `[N, C * taps]`, the order is that of a flattened weight `[O, C, kt, kh, kw]`.
    """
    kt, kh, kw = kernel
    _, c, t, h, w = x.shape
    if time_padding == "edges":
        x = torch.cat([x[:, :, :1].expand(-1, -1, kt // 2, -1, -1), x, x[:, :, -1:].expand(-1, -1, kt // 2, -1, -1)], 2)
    elif time_padding == "zeros_around":
        x = F.pad(x, (0, 0, 0, 0, kt // 2, kt // 2))
    elif time_padding == "first":
        x = torch.cat([x[:, :, :1].expand(-1, -1, kt - 1, -1, -1), x], dim=2)
    before = kt - 1 if time_padding == "zeros" else 0
    if space_padding != "zeros":
        x = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0), mode=space_padding)
        padded = F.pad(x, (0, 0, 0, 0, before, 0))
    else:
        padded = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, before, 0))
    _, _, tp, hp, wp = padded.shape
    rows = padded.permute(0, 2, 3, 4, 1).reshape(-1, c)  # [B Tp Hp Wp, C]
    positions = positions.to(x.device)
    col, rest = positions % w, positions // w
    row, rest = rest % h, rest // h
    frame, sample = rest % t, rest // t
    corner = ((sample * tp + frame) * hp + row) * wp + col  # [N]
    taps = [rows[corner + (dt * hp + dy) * wp + dx] for dt in range(kt) for dy in range(kh) for dx in range(kw)]
    return torch.stack(taps, dim=2)  # [N, C, taps]


def finer_positions(
    positions: Int64[Tensor, " N"],
    finer: tuple[int, ...],
    *,
    step: tuple[int, int, int],
    first: tuple[int, int, int],
) -> Int64[Tensor, " N"]:
    """Positions of a strided layer's output on the grid that it reads: index times `step` plus `first`, per axis.

    Args:
        positions: flat indices into `[B, T', H', W']`.
        finer: shape `[B, C, T, H, W]` of what is read.
    """
    _, _, t, h, w = finer
    coarse = [(size - start - 1) // stride + 1 for size, stride, start in zip((t, h, w), step, first, strict=True)]
    column, rest = positions % coarse[2], positions // coarse[2]
    row, rest = rest % coarse[1], rest // coarse[1]
    frame, sample = rest % coarse[0], rest // coarse[0]
    at = [index * stride + start for index, stride, start in zip((frame, row, column), step, first, strict=True)]
    return ((sample * t + at[0]) * h + at[1]) * w + at[2]


def gather_rows(y: Float[Tensor, "B O T H W"], positions: Int64[Tensor, " N"]) -> Float[Tensor, "N O"]:
    """The values of all channels at each position."""
    return y.permute(0, 2, 3, 4, 1).reshape(-1, y.shape[1])[positions.to(y.device)]
