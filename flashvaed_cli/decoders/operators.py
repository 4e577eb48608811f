"""The closed set of operators: every convolution of a decoder is one of these.

All map `[B, C, T, H, W]` to `[B, O, T, H, W]` and are causal in time. What an operator must remember
between chunks is read from `past` and written to `future`, dictionaries keyed by layer address: the
module itself holds no state. `past=None` means that the chunk is the first; `future=None` that no
further chunk follows.

Reference: Wan 2.1 VAE; arXiv 2602.19161, section 3.2 (depthwise-separable and 2D operators).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.spec import ConvSpec

Past = Mapping[str, Tensor] | None
Future = MutableMapping[str, Tensor] | None

NORM_EPS = 1e-12


def frames_as_batch(x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "BT C H W"]:
    """View the frames as a batch of images (no copy when `x` is channels_last_3d)."""
    b, c, t, h, w = x.shape
    return x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)


def batch_as_frames(x: Float[Tensor, "BT C H W"], batch: int) -> Float[Tensor, "B C T H W"]:
    """Undo `frames_as_batch`."""
    bt, c, h, w = x.shape
    return x.reshape(batch, bt // batch, c, h, w).permute(0, 2, 1, 3, 4)


def extend_with_past(
    x: Float[Tensor, "B C T H W"], num_past: int, address: str, past: Past, future: Future
) -> Float[Tensor, "B C Tp H W"]:
    """Put the `num_past` frames before `x` in front of it (zeros before the first) and remember its last ones."""
    if num_past == 0:
        return x
    window = F.pad(x, (0, 0, 0, 0, num_past, 0)) if past is None else torch.cat([past[address], x], dim=2)
    if future is not None:
        future[address] = window[:, :, -num_past:].clone()  # a view would keep the whole chunk alive
    return window


class Conv(nn.Module):
    """Weight and bias of one layer; `address` is its name in the spec and in the state."""

    def __init__(self, spec: ConvSpec, address: str, weight_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec
        self.address = address
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.zeros(spec.out_width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        s = self.spec
        return f"{s.in_width} -> {s.out_width}, kernel={s.kernel}"


class CausalConv3d(Conv):
    """Dense convolution, zero-padded in space, causal in time. Weight `[O, C, kt, kh, kw]`."""

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width, *spec.kernel))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        kt, kh, kw = self.spec.kernel
        window = extend_with_past(x, kt - 1, self.address, past, future)
        return F.conv3d(window, self.weight, self.bias, padding=(0, kh // 2, kw // 2))


class SeparableConv3d(Conv):
    """Depthwise causal convolution, then pointwise. `depthwise` `[C, 1, kt, kh, kw]`, `weight` `[O, C]`."""

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width))
        self.depthwise = nn.Parameter(torch.empty(spec.in_width, 1, *spec.kernel))
        nn.init.kaiming_uniform_(self.depthwise, a=math.sqrt(5))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        kt, kh, kw = self.spec.kernel
        window = extend_with_past(x, kt - 1, self.address, past, future)
        mixed = F.conv3d(window, self.depthwise, padding=(0, kh // 2, kw // 2), groups=self.spec.in_width)
        return F.conv3d(mixed, self.weight[:, :, None, None, None], self.bias)


class FrameConv2d(Conv):
    """Dense 2D convolution on each frame by itself. Weight `[O, C, kh, kw]`. Keeps no state."""

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width, *spec.kernel[1:]))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        kernel = self.spec.kernel
        y = F.conv2d(frames_as_batch(x), self.weight, self.bias, padding=(kernel[1] // 2, kernel[2] // 2))
        return batch_as_frames(y, x.shape[0])


class Pointwise(Conv):
    """1x1x1 convolution. Weight `[O, C]`. Keeps no state."""

    def __init__(self, spec: ConvSpec, address: str) -> None:
        super().__init__(spec, address, (spec.out_width, spec.in_width))

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        return F.conv3d(x, self.weight[:, :, None, None, None], self.bias)


OPERATORS: dict[str, Callable[[ConvSpec, str], Conv]] = {
    "causal3d": CausalConv3d,
    "dwsep3d": SeparableConv3d,
    "frame2d": FrameConv2d,
    "pointwise": Pointwise,
}


def build_conv(spec: ConvSpec, address: str) -> Conv:
    """The module of one layer."""
    return OPERATORS[spec.operator](spec, address)


class ChannelRMSNorm(nn.Module):
    """Divide each position by the root mean square over its channels, times `gamma` `[C]`.

    Computed in float32 when the input is half precision.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
        gain = self.gamma * self.gamma.shape[0] ** 0.5
        gain = gain.view(-1, *([1] * (x.ndim - 2)))
        exact = x if x.dtype == torch.float64 else x.float()
        return F.normalize(exact, dim=1, eps=NORM_EPS).to(x.dtype) * gain
