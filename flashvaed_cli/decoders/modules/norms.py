"""Norms over the channels of each position, and over groups of channels of each frame."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.convolution import batch_as_frames, frames_as_batch
from flashvaed_cli.decoders.spec.layers import Activation, NormSpec
from flashvaed_cli.errors import SpecError

NORM_EPS = 1e-12
LAYER_NORM_EPS = 1e-6


class ChannelRMSNorm(nn.Module):
    """Divide each position by the root mean square over its channels, times `gamma` `[C]`, plus `beta` `[C]`.

    `gamma` and `beta` are None where the spec has no gain or shift. Computed in float32 when the input is half
    precision.
    """

    def __init__(self, width: int, spec: NormSpec | None = None) -> None:
        super().__init__()
        self.spec = spec or NormSpec()
        self.eps = self.spec.eps
        self.width = width
        self.gamma = nn.Parameter(torch.ones(width)) if self.spec.gain else None
        self.beta = nn.Parameter(torch.zeros(width)) if self.spec.shift else None

    def forward(self, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
        gain = self._gain(x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            exact = x if x.dtype == torch.float64 else x.float()
            y = self._unit(exact).to(x.dtype) * gain
            return y if self.beta is None else y + _per_channel(self.beta, x)
        if x.dtype in (torch.float32, torch.float64):
            return self._shifted_((x * self._scale(x)).mul_(gain.to(x.dtype)))
        y = torch.empty_like(x)
        for part, result in zip(x.split(1, dim=2), y.split(1, dim=2), strict=True):  # a float32 copy of one frame
            exact = part.float()
            result.copy_(self._shifted_(exact.mul_(self._scale(exact)).mul_(gain.float())))
        return y

    def _gain(self, x: Tensor) -> Tensor:
        """The factor of a vector of length one (with an eps: of mean square one)."""
        root = self.width**0.5 if self.eps is None else 1.0
        return x.new_tensor(root) if self.gamma is None else _per_channel(self.gamma * root, x)

    def _unit(self, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
        if self.eps is None:
            return F.normalize(x, dim=1, eps=NORM_EPS)
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)

    def _scale(self, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B 1 *P"]:
        norm = _vector_norm(x)
        if self.eps is None:
            return norm.clamp_min_(NORM_EPS).reciprocal_()
        return norm.square_().div_(self.width).add_(self.eps).rsqrt_()

    def _shifted_(self, y: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
        return y if self.beta is None else y.add_(_per_channel(self.beta.to(y.dtype), y))


class ChannelLayerNorm(nn.Module):
    """Subtract the mean over the channels, divide by the standard deviation, times `gamma` `[C]`, plus `beta` `[C]`."""

    def __init__(self, width: int, eps: float = LAYER_NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
        y = F.layer_norm(x.movedim(1, -1), self.gamma.shape, self.gamma, self.beta, self.eps)
        return y.movedim(-1, 1)


class FrameGroupNorm(nn.Module):
    """GroupNorm over each frame, or over whole clips: each group minus its mean, divided by its standard deviation.

    Times `gamma` `[C]`, plus `beta` `[C]`; None where the spec has no gain or shift. torch computes the statistics in
    float32 for half-precision input.

    Raises:
        SpecError: the groups do not divide the channels.
    """

    def __init__(self, width: int, spec: NormSpec) -> None:
        super().__init__()
        assert spec.groups is not None and spec.eps is not None
        if width % spec.groups:
            raise SpecError(f"a GroupNorm cannot part {width} channels into {spec.groups} equal groups")
        self.spec = spec
        self.groups = spec.groups
        self.eps: float = spec.eps
        self.width = width
        self.gamma = nn.Parameter(torch.ones(width)) if spec.gain else None
        self.beta = nn.Parameter(torch.zeros(width)) if spec.shift else None

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        if self.spec.over == "clip":
            return F.group_norm(x, self.groups, self.gamma, self.beta, self.eps)
        frames = F.group_norm(frames_as_batch(x), self.groups, self.gamma, self.beta, self.eps)
        return batch_as_frames(frames, x)


Norm = ChannelRMSNorm | FrameGroupNorm
"""The norms before the layers of a block."""


def build_norm(width: int, spec: NormSpec) -> Norm:
    """The module of a norm over `width` channels."""
    return ChannelRMSNorm(width, spec) if spec.groups is None else FrameGroupNorm(width, spec)


def norm_silu(norm: Norm, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
    """SiLU of the norm; the norm's output is overwritten where no gradient needs it."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def activate(x: Float[Tensor, "B C *P"], activation: Activation, *, in_place: bool = True) -> Float[Tensor, "B C *P"]:
    """The activation of `x`, which is overwritten where no gradient needs it and `in_place` allows it."""
    in_place = in_place and not torch.is_grad_enabled()
    if activation == "relu":
        return F.relu(x, inplace=in_place)
    return F.silu(x, inplace=in_place) if activation == "silu" else x


def _per_channel(values: Tensor, x: Float[Tensor, "B C *P"]) -> Tensor:
    return values.view(-1, *([1] * (x.ndim - 2)))


def _vector_norm(x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B 1 *P"]:
    """|x| over the channels, by the sum that is fast in the layout of `x`."""
    if x.stride(1) == 1:
        return torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return (x * x).sum(1, keepdim=True).sqrt_()
