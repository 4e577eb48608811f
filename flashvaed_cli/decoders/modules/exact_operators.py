"""Exact twins: the same function of the same parameters as a plain operator, computed another way.

A twin's `weight` and `bias` have the plain operator's names and shapes, so changing the spec is enough to swap them,
and both write the same state. `variants.exact` chooses the twin of each layer. The frames are equal up to rounding:
only the order of the sums changes, and in half precision how often a sum is rounded.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.convolution import (
    Conv,
    Future,
    Past,
    batch_as_frames,
    frames_as_batch,
    remember,
    space_window,
    time_window,
)
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.numerics.products import linear

HALF_PRECISION = (torch.bfloat16, torch.float16)

WIDE_KERNEL = 1 << 18
"""Product of both widths above which torch's convolutions spend their time on laying out the kernel again."""

FEW_POSITIONS = 256
"""Positions up to which patches and one matrix product are faster than that: 1.6 times at 192, from 512 to 4096."""


class TapwiseConv3d(Conv):
    """causal3d as a sum over temporal taps of convolutions of single frames. Weight `[O, C, kt, kh, kw]`.

    No window of past and present frames is built if zeros come before the first frame, no zeros are multiplied, and
    torch's CPU backend always finds its fast 2D kernel (its conv3d falls back to a slow float32 one for small inputs).
    Half precision with a past has neither zeros nor a slow kernel, and a wide kernel costs more than its products: the
    plain form is faster there, and is used.
    """

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width, *spec.kernel))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        kt = self.spec.kernel[0]
        if self.spec.time_padding != "zeros" or (x.dtype in HALF_PRECISION and past is not None):
            window, margins = space_window(time_window(x, self.spec, self.address, past, future), self.spec)
            return _conv_over_window(window, self.weight, self.bias, margins)
        before = None
        if past is not None and kt > 1:  # a single tap has no past
            before, _ = space_window(past[self.address], self.spec)
        frames, margins = space_window(x, self.spec)
        y = sum_over_taps(frames, before, self.weight, self.bias, margins)
        remember(x, kt - 1, self.address, past, future)
        return y


Margins = tuple[int, int]
"""Rows and columns of zeros that a convolution adds on each side of the frames."""


def sum_over_taps(
    x: Float[Tensor, "B C T H W"],
    before: Float[Tensor, "B C P H W"] | None,
    weight: Float[Tensor, "O _I kt kh kw"],
    bias: Float[Tensor, " O"] | None,
    margins: Margins = (0, 0),
    groups: int = 1,
) -> Float[Tensor, "B O T Ho Wo"]:
    """A causal convolution, tap after tap. `before`: the kt - 1 frames before `x`; None: zeros."""
    kt, num_frames = weight.shape[2], x.shape[2]
    y = _tap(x, weight[:, :, kt - 1], bias, margins, groups)
    for delay in range(1, kt):
        tap = weight[:, :, kt - 1 - delay]
        if num_frames > delay:
            y[:, :, delay:] += _tap(x[:, :, : num_frames - delay], tap, None, margins, groups)
        if before is not None:
            reach = min(delay, num_frames)
            y[:, :, :reach] += _tap(before[:, :, kt - 1 - delay : kt - 1 - delay + reach], tap, None, margins, groups)
    return y


def _conv_over_window(
    window: Float[Tensor, "B C Tp H W"],
    weight: Float[Tensor, "O C kt kh kw"],
    bias: Float[Tensor, " O"],
    margins: Margins,
) -> Float[Tensor, "B O T Ho Wo"]:
    """The same for frames with their margins in time, by the method that is fastest for the size."""
    b, _, *inputs = window.shape
    num_frames, height, width = (
        side - taps + 1 + 2 * margin for side, taps, margin in zip(inputs, weight.shape[2:], (0, *margins), strict=True)
    )
    wide = weight.shape[0] * weight.shape[1] >= WIDE_KERNEL
    if wide and weight.stride(1) == 1 and b * num_frames * height * width <= FEW_POSITIONS:
        return _unrolled(window, weight, bias, margins)
    if wide or window.dtype in HALF_PRECISION:
        return F.conv3d(window, weight, bias, padding=(0, *margins))
    y = _tap(window[:, :, :num_frames], weight[:, :, 0], bias, margins)
    for tap in range(1, weight.shape[2]):
        y += _tap(window[:, :, tap : tap + num_frames], weight[:, :, tap], None, margins)
    return y


def _unrolled(
    window: Float[Tensor, "B C Tp H W"],
    weight: Float[Tensor, "O C kt kh kw"],
    bias: Float[Tensor, " O"],
    margins: Margins,
) -> Float[Tensor, "B O T Ho Wo"]:
    """As one matrix product, which reads a channels-last kernel without a copy."""
    frames = F.pad(window.permute(0, 2, 3, 4, 1), (0, 0, margins[1], margins[1], margins[0], margins[0]))
    for axis, taps in enumerate(weight.shape[2:], start=1):
        frames = frames.unfold(axis, taps, 1)
    patches = frames.permute(0, 1, 2, 3, 5, 6, 7, 4).flatten(4)  # [B, T, Ho, Wo, K]
    return linear(patches, weight.permute(0, 2, 3, 4, 1).flatten(1), bias).permute(0, 4, 1, 2, 3)


def _tap(
    x: Float[Tensor, "B C t H W"],
    weight: Float[Tensor, "O _I kh kw"],
    bias: Float[Tensor, " O"] | None,
    margins: Margins,
    groups: int = 1,
) -> Float[Tensor, "B O t Ho Wo"]:
    return batch_as_frames(F.conv2d(frames_as_batch(x), weight, bias, padding=margins, groups=groups), x)


class StackedConv3d(Conv):
    """causal3d with few outputs: its temporal taps are further outputs of one 2D convolution, added up afterwards.

    Weight `[O, C, kt, kh, kw]`. The input, many times wider than the output, is read once.
    Half-precision products are added up in float32.
    """

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width, *spec.kernel))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        kt = self.spec.kernel[0]
        num_frames = x.shape[2]
        frames, margins = space_window(x, self.spec)
        taps = self._taps(frames, kt, margins)
        y = taps[:, :, kt - 1] + self.bias.to(taps.dtype)[:, None, None]  # [B, T, O, H, W]
        for delay in range(1, kt):
            if num_frames > delay:
                y[:, delay:] += taps[:, : num_frames - delay, kt - 1 - delay]
        if past is not None:
            before, _ = space_window(past[self.address], self.spec)
            taps = self._taps(before, kt - 1, margins)
            for delay in range(1, kt):
                reach = min(delay, num_frames)
                first = kt - 1 - delay
                y[:, :reach] += taps[:, first : first + reach, first]
        elif self.spec.time_padding == "first":
            for delay in range(1, kt):
                y[:, : min(delay, num_frames)] += taps[:, :1, kt - 1 - delay]
        remember(x, kt - 1, self.address, past, future, self.spec.time_padding)
        return y.to(x.dtype).permute(0, 2, 1, 3, 4)

    def _taps(self, x: Float[Tensor, "B C T H W"], num_taps: int, margins: Margins) -> Float[Tensor, "B T K O Ho Wo"]:
        """The product of each frame with each of the first `num_taps` temporal taps."""
        weight = self.weight[:, :, :num_taps].permute(2, 0, 1, 3, 4).flatten(0, 1)  # [K O, C, kh, kw]
        y = F.conv2d(frames_as_batch(x), weight, padding=margins)
        wide = y if y.dtype == torch.float64 else y.float()
        return wide.unflatten(0, (x.shape[0], x.shape[2])).unflatten(2, (num_taps, self.spec.out_width))


class SubpixelConv2d(Conv):
    """An upsampler's `spatial`: nearest x2 and a 3x3 kernel as four 2x2 kernels on the small frames.

    The 3x3 taps around an output pixel that lie on the same source pixel are summed: four products instead of nine, and
    no enlarged tensor. Weight `[O, C, 3, 3]`, folded in float32 on every call, so that it may change in place. Maps
    `[B, C, T, H, W]` to `[B, O, T, 2 H, 2 W]`. Keeps no state.
    """

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width, *spec.kernel[1:]))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T Hu Wu"]:
        b, _, t, h, w = x.shape
        weight = fold_phases(self.weight)
        phases = F.conv2d(frames_as_batch(x), weight.flatten(0, 2), self.bias.repeat(4), padding=1)
        phases = phases.unflatten(1, (2, 2, self.spec.out_width)).permute(0, 1, 2, 4, 5, 3)  # [BT, 2, 2, H+1, W+1, O]
        y = phases.new_empty(b * t, h, 2, w, 2, self.spec.out_width)
        for i in range(2):
            for j in range(2):
                y[:, :, i, :, j] = phases[:, i, j, i : i + h, j : j + w]
        return y.reshape(b, t, 2 * h, 2 * w, self.spec.out_width).permute(0, 4, 1, 2, 3)


def fold_phases(weight: Float[Tensor, "O C 3 3"]) -> Float[Tensor, "2 2 O C 2 2"]:
    """The 2x2 kernel of each output pixel of a 2x2 cell (row, column), summed in float32 at least."""
    exact = weight if weight.dtype == torch.float64 else weight.float()
    top, middle, bottom = exact.unbind(2)
    rows = torch.stack([torch.stack([top, middle + bottom], 2), torch.stack([top + middle, bottom], 2)])
    left, centre, right = rows.unbind(-1)  # each [2, O, C, 2]
    cells = torch.stack([torch.stack([left, centre + right], -1), torch.stack([left + centre, right], -1)], 1)
    return cells.to(weight.dtype)
