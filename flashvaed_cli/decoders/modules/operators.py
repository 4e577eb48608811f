"""The closed set of operators: every convolution of a decoder is one of these.

All map `[B, C, T, H, W]` to `[B, O, T, H, W]` and are causal in time unless `time_padding` says otherwise.
What an operator must remember between chunks is read from `past` and written to `future`, dictionaries
keyed by layer address: the module itself holds no state. `past=None` means that the chunk is the first;
`future=None` that no further chunk follows.

Reference: Wan 2.1 VAE; arXiv 2602.19161, section 3.2 (depthwise-separable and 2D operators).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.convolution import (
    Conv,
    Future,
    Past,
    batch_as_frames,
    draw_,
    extend_with_past,
    frames_as_batch,
    remember,
    space_window,
    time_window,
)
from flashvaed_cli.decoders.modules.exact_operators import StackedConv3d, SubpixelConv2d, TapwiseConv3d, sum_over_taps
from flashvaed_cli.decoders.modules.norms import ChannelLayerNorm, ChannelRMSNorm, norm_silu
from flashvaed_cli.decoders.modules.winograd import WinogradConv3d
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.numerics.products import linear
from flashvaed_cli.numerics.reduced_rank import factorise
from flashvaed_cli.numerics.separable import separable_from_dense

__all__ = [
    "ChannelLayerNorm",
    "ChannelRMSNorm",
    "Conv",
    "Future",
    "Past",
    "batch_as_frames",
    "extend_with_past",
    "frames_as_batch",
    "norm_silu",
]


class CausalConv3d(Conv):
    """Dense convolution, padded as its spec says. Weight `[O, C, kt, kh, kw]`."""

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width, *spec.kernel))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        window, margins = space_window(time_window(x, self.spec, self.address, past, future), self.spec)
        return F.conv3d(window, self.weight, self.bias, padding=(0, *margins))


class SeparableConv3d(Conv):
    """Depthwise convolution (`depthwise` `[C, 1, kt, kh, kw]`, padded as its spec says), then `weight` `[O, C]`."""

    channel_axes = {**Conv.channel_axes, "depthwise": (None, 0)}

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width))
        self.depthwise = nn.Parameter(torch.empty(spec.in_width, 1, *spec.kernel))
        draw_(self.depthwise)

    def dense_kernel(self) -> Float[Tensor, "O C kt kh kw"]:
        return self.weight[:, :, None, None, None] * self.depthwise[None, :, 0]

    def set_dense_kernel_(self, kernel: Float[Tensor, "O C kt kh kw"]) -> None:
        depthwise, pointwise = separable_from_dense(kernel)
        self.depthwise.copy_(depthwise[:, None])
        self.weight.copy_(pointwise)

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        mixed = depthwise_conv(x, self.depthwise, None, self, past, future)
        return pointwise_conv(mixed, self.weight, self.bias)


class DepthwiseConv3d(Conv):
    """Depthwise convolution alone, padded as its spec says. Weight `[C, 1, kt, kh, kw]`."""

    channel_axes = {**Conv.channel_axes, "weight": (0, None)}

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.in_width, 1, *spec.kernel))

    def dense_kernel(self) -> Float[Tensor, "C C kt kh kw"]:
        return torch.diag_embed(self.weight[:, 0].movedim(0, -1)).permute(3, 4, 0, 1, 2)

    def set_dense_kernel_(self, kernel: Float[Tensor, "C C kt kh kw"]) -> None:
        self.weight.copy_(kernel.diagonal().movedim(-1, 0)[:, None])

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B C T H W"]:
        return depthwise_conv(x, self.weight, self.bias, self, past, future)


class FrameConv2d(Conv):
    """Dense 2D convolution on each frame by itself. Weight `[O, C, kh, kw]`. Keeps no state."""

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width, *spec.kernel[1:]))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        window, margins = space_window(x, self.spec)
        y = F.conv2d(frames_as_batch(window), self.weight, self.bias, padding=margins)
        return batch_as_frames(y, x)


class Pointwise(Conv):
    """1x1x1 convolution. Weight `[O, C]`. Keeps no state."""

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        return pointwise_conv(x, self.weight, self.bias)


class LowRankConv3d(Conv):
    """A causal kernel of one tap in space, as a product of rank r: `reduce` `[r, C, kt, 1, 1]`, `weight` `[O, r]`.

    The temporal taps come first: r (kt C + O) products per position, fewer than r (C + kt O) for O > C; it is also the
    result of least squares of rank r.
    """

    channel_axes = {**Conv.channel_axes, "weight": (0, None), "reduce": (None, 1)}

    def __init__(self, spec: ConvSpec, address: str) -> None:
        assert spec.rank is not None
        super().__init__(spec, address, (spec.out_width, spec.rank))
        self.reduce = nn.Parameter(torch.empty(spec.rank, spec.in_width, *spec.kernel))
        draw_(self.reduce)

    def dense_kernel(self) -> Float[Tensor, "O C kt 1 1"]:
        kernel = self.weight @ self.reduce.flatten(1)
        return kernel.reshape(self.spec.out_width, self.spec.in_width, *self.spec.kernel)

    def set_dense_kernel_(self, kernel: Float[Tensor, "O C kt 1 1"]) -> None:
        outer, inner = factorise(kernel.flatten(1), self.weight.shape[1])
        self.weight.copy_(outer)
        self.reduce.copy_(inner.reshape(self.reduce.shape))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        num_past = self.spec.kernel[0] - 1
        before = None if past is None or num_past == 0 else past[self.address]
        hidden = sum_over_taps(x, before, self.reduce, None)
        remember(x, num_past, self.address, past, future)
        return pointwise_conv(hidden, self.weight, self.bias)


def depthwise_conv(
    x: Float[Tensor, "B C T H W"],
    weight: Float[Tensor, "C 1 kt kh kw"],
    bias: Float[Tensor, " C"] | None,
    layer: Conv,
    past: Past = None,
    future: Future = None,
) -> Float[Tensor, "B C T H W"]:
    """Each channel by itself, padded as the spec of `layer` says.

    On a CPU, channels innermost, tap after tap: a window of past and present frames takes longer to build than to read.
    """
    spec = layer.spec
    is_tapwise = x.stride(1) == 1 and x.device.type == "cpu" and spec.time_padding == "zeros"
    if is_tapwise and not torch.compiler.is_compiling():
        before = None
        if past is not None and spec.num_past:
            before, _ = space_window(past[layer.address], spec)
        frames, margins = space_window(x, spec)
        y = sum_over_taps(frames, before, weight, bias, margins, groups=spec.in_width)
        remember(x, spec.num_past, layer.address, past, future)
        return y
    window, margins = space_window(time_window(x, spec, layer.address, past, future), spec)
    return F.conv3d(window, weight, bias, padding=(0, *margins), groups=spec.in_width)


def pointwise_conv(
    x: Float[Tensor, "B C T H W"], weight: Float[Tensor, "O C"], bias: Float[Tensor, " O"]
) -> Float[Tensor, "B O T H W"]:
    """1x1x1 as a 2D convolution: on frames as a batch if channels are innermost, else on frames stacked vertically.

    Both are views, and the output keeps the layout of the input. torch's 1x1 convolution of a single image does not, so
    a single channels-last frame is done as a matrix product.
    """
    kernel = weight[:, :, None, None]
    if x.stride(1) != 1:
        return F.conv2d(x.flatten(2, 3), kernel, bias).unflatten(2, x.shape[2:4])
    if x.shape[0] * x.shape[2] == 1:
        return linear(x.permute(0, 2, 3, 4, 1), weight, bias).permute(0, 4, 1, 2, 3)
    return batch_as_frames(F.conv2d(frames_as_batch(x), kernel, bias), x)


OPERATORS: dict[Operator, Callable[[ConvSpec, str], Conv]] = {
    "causal3d": CausalConv3d,
    "dwsep3d": SeparableConv3d,
    "frame2d": FrameConv2d,
    "pointwise": Pointwise,
    "lowrank3d": LowRankConv3d,
    "tapwise3d": TapwiseConv3d,
    "stacked3d": StackedConv3d,
    "winograd3d": WinogradConv3d,
    "subpixel2d": SubpixelConv2d,
    "depthwise3d": DepthwiseConv3d,
}


def build_conv(spec: ConvSpec, address: str) -> Conv:
    """The module of one layer."""
    return OPERATORS[spec.operator](spec, address)
