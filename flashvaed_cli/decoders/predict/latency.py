"""Decoding time as a function of the widths after pruning: measured points, interpolated.

A block's time depends on one or two *axes*, each a tuple of channel groups: a residual block's on its stream (two
groups if its entry is a group of its own) and on its inside, an upsampler's on the streams before and after it, the
head's on the stream before it. The input of a bypass counts among the streams before the block that the bypass ends
with. The coordinate on an axis is the width of its group, or the geometric mean of the widths of two. Blocks that no
group reaches take a fixed time.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.decoders.spec.groups import ChannelGroup, input_tensors

Axis = tuple[str, ...]
"""Names of the channel groups that share a coordinate."""

LOWEST_RATIO = 0.125
"""The narrowest width that is measured and searched, as a fraction of the full width (as in the paper)."""


def width_ladder(width: int) -> tuple[int, ...]:
    """The widths worth trying, widest first: `width` itself, then of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, ...

    These are powers of two and three times those: multiples of 4 above 8 and of 8 above 16, which suit vector units
    and blocked layouts. None is below an eighth of `width`.
    """
    lowest = max(math.ceil(width * LOWEST_RATIO), 1)
    rungs = {scale << power for scale in (1, 3) for power in range(width.bit_length())}
    return (width, *sorted((rung for rung in rungs if lowest <= rung < width), reverse=True))


def rounded_ladder(ladder: Sequence[int], round_to: int) -> tuple[int, ...]:
    """A ladder with every width but the first, the full one, rounded up to a multiple of `round_to`."""
    full = ladder[0]
    rounded = {math.ceil(width / round_to) * round_to for width in ladder[1:]}
    return (full, *sorted((width for width in rounded if width < full), reverse=True))


def block_axes(spec: CoderSpec, groups: Sequence[ChannelGroup]) -> dict[str, tuple[Axis, ...]]:
    """The axes of every block that one of `groups` reaches, by address, in forward order."""
    owner = {tensor: group.name for group in groups for tensor in group.tensors}
    found: dict[str, tuple[Axis, ...]] = {}
    sources = input_tensors(spec)
    bypassed = spec.bypassed()
    for address, block in spec.blocks():
        before, after = owner.get(sources[address] or ""), owner.get(address)
        inner = tuple(owner[tensor] for name in block.inner_tensors if (tensor := f"{address}.{name}") in owner)
        past = owner.get(sources[f"{bypassed[address].name}.0"] or "") if address in bypassed else None
        stream = tuple(dict.fromkeys(name for name in (before, after) if name))
        if block.holds_channels and inner:
            axes = (inner,)
        elif block.inner_tensors:
            axes = (stream, inner)
        elif past and past != before:
            axes = (tuple(name for name in (before, past) if name), (after,) if after else ())
        else:
            axes = tuple((name,) for name in stream)
        if reached := tuple(axis for axis in axes if axis):
            found[address] = reached
    return found


def coordinate(axis: Axis, widths: Mapping[str, int]) -> float:
    """The position of widths on an axis."""
    return math.prod(widths[name] for name in axis) ** (1 / len(axis))


@dataclass(frozen=True)
class BlockLatency:
    """The time of one block, in milliseconds, on a grid of widths.

    Attributes:
        widths: the coordinates on each axis, ascending.
        latency_ms: one value per grid point, the last axis fastest.
    """

    address: str
    axes: tuple[Axis, ...]
    widths: tuple[tuple[float, ...], ...]
    latency_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse values that do not fill the grid. Raises ValueError."""
        if math.prod(len(values) for values in self.widths) != len(self.latency_ms):
            raise ValueError(f"{self.address}: {len(self.latency_ms)} values do not fill the grid {self.widths}")

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Milliseconds at the given widths of its groups: exact on the grid, between its points linear in the
        logarithms of width and time, which is exact for powers of the width.

        Raises:
            ValueError: a width outside the grid.
        """
        sides = [self._sides(axis, values, widths) for axis, values in zip(self.axes, self.widths, strict=True)]
        total = 0.0
        for corner in itertools.product(*sides):
            index = 0
            for (position, _), values in zip(corner, self.widths, strict=True):
                index = index * len(values) + position
            total += math.prod(share for _, share in corner) * math.log(self.latency_ms[index])
        return math.exp(total)

    def _sides(self, axis: Axis, values: Sequence[float], widths: Mapping[str, int]) -> list[tuple[int, float]]:
        """The grid points on both sides of a coordinate, with their weights."""
        at = coordinate(axis, widths)
        if not values[0] * (1 - 1e-9) <= at <= values[-1] * (1 + 1e-9):
            raise ValueError(f"{self.address}: {at:g} of {'+'.join(axis)} is outside what was measured, {values}")
        low = min(max(bisect_right(values, at) - 1, 0), len(values) - 1)
        high = min(low + 1, len(values) - 1)
        if high == low:
            return [(low, 1.0)]
        share = min(max(math.log(at / values[low]) / math.log(values[high] / values[low]), 0.0), 1.0)
        return [(low, 1 - share), (high, share)] if share else [(low, 1.0)]


@dataclass(frozen=True)
class WidthLatency:
    """The latency model of a decoder.

    Attributes:
        fixed_ms: total time of the blocks that no group reaches.
        blocks: a table for each of the other blocks.
        ladders: the widths at which each group was measured, widest first. A layer's time can change abruptly with
            its width, so only these are reliable.
    """

    fixed_ms: float
    blocks: tuple[BlockLatency, ...]
    ladders: Mapping[str, tuple[int, ...]]

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Decoding time in milliseconds at the given widths of all its groups."""
        return self.fixed_ms + sum(block(widths) for block in self.blocks)
