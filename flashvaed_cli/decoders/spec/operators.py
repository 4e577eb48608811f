"""The operators of convolutions as data: their limits, weights, cost, and conversions.

Imports no torch. Reference: Wan 2.1 VAE; arXiv 2602.19161, section 3.2 for the plain operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flashvaed_cli.decoders.spec.layers import ConvSpec

Operator = Literal[
    "causal3d",
    "dwsep3d",
    "frame2d",
    "pointwise",
    "lowrank3d",
    "tapwise3d",
    "stacked3d",
    "winograd3d",
    "subpixel2d",
    "depthwise3d",
]
"""Plain operators:
    causal3d: dense kernel `(kt, kh, kw)`, causal in time (zeros before the first frame).
    dwsep3d: depthwise causal `(kt, kh, kw)`, then pointwise.
    frame2d: dense `(1, kh, kw)` on every frame by itself.
    pointwise: `(1, 1, 1)`.
    lowrank3d: causal `(kt, 1, 1)` to `rank` channels, then pointwise.
    depthwise3d: depthwise causal `(kt, kh, kw)` alone; as many channels leave as enter.
Exact twins (the same parameters and, up to rounding, the same outputs as the operator in brackets):
    tapwise3d [causal3d]: a sum over temporal taps of 2D convolutions; no window, no products with zeros.
    stacked3d [causal3d]: one 2D convolution to `kt` times as many channels, added up over time: few outputs.
    winograd3d [causal3d]: `(kt, 3, 3)` by minimal filtering, a quarter of the products; half precision: tapwise3d.
    subpixel2d [frame2d]: an upsampler's `spatial` (3x3) only: the nearest upsampling before it is folded into
        four 2x2 kernels on the small frames.
"""
Grid = tuple[int, int, int]
"""Frames, height, width of a tensor."""


def _dense_weights(layer: ConvSpec) -> int:
    return layer.in_width * layer.out_width * _volume(layer)


def _one_per_weight(layer: ConvSpec, grid: Grid) -> int:
    return OPERATOR_FACTS[layer.operator].weights(layer) * _size(grid)


def _no_fault(layer: ConvSpec) -> str | None:
    return None


@dataclass(frozen=True)
class OperatorFacts:
    """The facts about an operator that need no module.

    Attributes:
        fault: why a layer cannot have this operator, as a message; None if it can.
        weights: number of weights of a layer, without the bias.
        multiplies: multiplications of a layer on a grid, for a whole video in float32.
        twin_of: the plain operator with the same parameters and outputs, if this is an exact twin.
        made_from: the operators that convert-ops can replace with this one.
    """

    fault: Callable[[ConvSpec], str | None] = _no_fault
    weights: Callable[[ConvSpec], int] = _dense_weights
    multiplies: Callable[[ConvSpec, Grid], int] = _one_per_weight
    twin_of: Operator | None = None
    made_from: tuple[Operator, ...] = ()


def _size(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _volume(layer: ConvSpec) -> int:
    return _size(layer.kernel)


def _num_taps(layer: ConvSpec, num_frames: int) -> int:
    """Temporal taps over all frames of a video, without those that would reach before its first frame."""
    if layer.time_padding != "zeros":
        return layer.kernel[0] * num_frames
    return sum(max(num_frames - delay, 0) for delay in range(layer.kernel[0]))


def _depthwise_fault(layer: ConvSpec) -> str | None:
    if layer.in_width == layer.out_width:
        return None
    return f"a depthwise3d layer gives the {layer.in_width} channels it takes, not {layer.out_width}"


def _frame_fault(layer: ConvSpec) -> str | None:
    if layer.kernel[0] == 1:
        return None
    return f"a {layer.operator} layer has one temporal tap, not kernel {layer.kernel}"


def _pointwise_fault(layer: ConvSpec) -> str | None:
    return None if layer.kernel == (1, 1, 1) else f"a pointwise layer has kernel (1, 1, 1), not {layer.kernel}"


def _low_rank_fault(layer: ConvSpec) -> str | None:
    if layer.kernel[1:] == (1, 1) and layer.time_padding == "zeros":
        return None
    return f"a lowrank3d layer has one tap in space and pads zeros in time, not {layer.kernel}"


def _low_rank_multiplies(layer: ConvSpec, grid: Grid) -> int:
    """The taps that there are, to `rank` channels, and the pointwise layer after them."""
    rank = layer.rank or 0
    return rank * (layer.in_width * _num_taps(layer, grid[0]) * grid[1] * grid[2] + layer.out_width * _size(grid))


def _tapwise_multiplies(layer: ConvSpec, grid: Grid) -> int:
    _, kh, kw = layer.kernel
    return layer.in_width * layer.out_width * kh * kw * _num_taps(layer, grid[0]) * grid[1] * grid[2]


def _stacked_fault(layer: ConvSpec) -> str | None:
    if not layer.num_ahead:
        return None
    return f"a stacked3d layer is causal in time, not padded with {layer.time_padding}"


def _unlike_3x3(layer: ConvSpec) -> str | None:
    if layer.kernel[1:] == (3, 3):
        return None
    return f"a {layer.operator} layer has 3x3 taps in space, not kernel {layer.kernel}"


def _winograd_multiplies(layer: ConvSpec, grid: Grid) -> int:
    """36 products per 4x4 tile, and the transforms of kernel, input and output as the matrix products they are."""
    t, h, w = grid
    kt, tiles = layer.kernel[0], -(-h // 4) * -(-w // 4)
    channels = layer.in_width * layer.out_width
    inputs = t if layer.time_padding == "zeros" else t + kt - 1
    transforms = 36 * 36 * layer.in_width * inputs * tiles + 16 * 36 * layer.out_width * t * tiles
    return 36 * channels * min(kt, inputs) * t * tiles + transforms + 36 * 9 * min(kt, inputs) * channels


def _subpixel_fault(layer: ConvSpec) -> str | None:
    fault = _frame_fault(layer) or _unlike_3x3(layer)
    if fault is None and layer.space_padding != "zeros":
        fault = f"a {layer.operator} layer pads zeros around frames, not {layer.space_padding}"
    return fault


def _subpixel_multiplies(layer: ConvSpec, grid: Grid) -> int:
    """Four taps for every enlarged pixel (the margin of one small pixel is not counted)."""
    return layer.in_width * layer.out_width * 4 * _size(grid)


OPERATOR_FACTS: dict[Operator, OperatorFacts] = {
    "causal3d": OperatorFacts(),
    "dwsep3d": OperatorFacts(
        weights=lambda layer: layer.in_width * (_volume(layer) + layer.out_width), made_from=("causal3d", "frame2d")
    ),
    "frame2d": OperatorFacts(fault=_frame_fault, made_from=("causal3d",)),
    "pointwise": OperatorFacts(fault=_pointwise_fault),
    "lowrank3d": OperatorFacts(
        fault=_low_rank_fault,
        weights=lambda layer: (layer.rank or 0) * (layer.in_width * layer.kernel[0] + layer.out_width),
        multiplies=_low_rank_multiplies,
    ),
    "tapwise3d": OperatorFacts(multiplies=_tapwise_multiplies, twin_of="causal3d"),
    "stacked3d": OperatorFacts(fault=_stacked_fault, twin_of="causal3d"),
    "winograd3d": OperatorFacts(fault=_unlike_3x3, multiplies=_winograd_multiplies, twin_of="causal3d"),
    "subpixel2d": OperatorFacts(fault=_subpixel_fault, multiplies=_subpixel_multiplies, twin_of="frame2d"),
    "depthwise3d": OperatorFacts(fault=_depthwise_fault, weights=lambda layer: layer.in_width * _volume(layer)),
}
