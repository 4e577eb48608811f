"""What all operators share: the clip as a batch of frames, the state between chunks, one layer's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.spec.layers import ConvSpec, TimePadding
from flashvaed_cli.errors import SpecError

Past = Mapping[str, Tensor] | None
Future = MutableMapping[str, Tensor] | None


def frames_as_batch(x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "BT C H W"]:
    """View the frames as a batch of images (no copy when `x` is channels_last_3d)."""
    b, c, t, h, w = x.shape
    if t == 1:  # a reshape would give the side of one a stride by which torch no longer sees the layout
        return x.squeeze(2)
    return x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)


def batch_as_frames(x: Float[Tensor, "BT C H W"], clip: Float[Tensor, "B _C T _H _W"]) -> Float[Tensor, "B C T H W"]:
    """Undo `frames_as_batch`, for as many clips and frames as `clip` has.

    The frames are not the batch divided by the clips: with that, exporting SeedVR2's graph took minutes, not 46 s.
    """
    b, _, t = clip.shape[:3]
    if not torch.compiler.is_exporting() and t == 1:  # an exported graph takes one frame and more
        return x.unsqueeze(2)
    return x.reshape(b, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)


def extend_with_past(
    x: Float[Tensor, "B C T H W"],
    num_past: int,
    address: str,
    past: Past,
    future: Future,
    padding: TimePadding = "zeros",
) -> Float[Tensor, "B C Tp H W"]:
    """Prepend the `num_past` frames before `x` (at the start of a video zeros, or its first frame repeated), and
    remember the last ones."""
    if num_past == 0:
        return x
    if past is not None:
        window = torch.cat([past[address], x], dim=2)
    elif padding == "zeros":
        window = F.pad(x, (0, 0, 0, 0, num_past, 0))
    else:
        window = torch.cat([*_repeated(x[:, :, :1], num_past), x], dim=2)
    if future is not None:
        future[address] = window[:, :, -num_past:].clone()  # a view would keep the whole chunk alive
    return window


def _repeated(frame: Float[Tensor, "B C 1 H W"], count: int) -> list[Float[Tensor, "B C 1 H W"]]:
    """A frame several times, to be joined: `torch.cat` keeps the layout of frames, but not of an expanded frame."""
    return [frame] * count


def time_window(
    x: Float[Tensor, "B C T H W"], spec: ConvSpec, address: str, past: Past = None, future: Future = None
) -> Float[Tensor, "B C Tp H W"]:
    """All frames that a layer's kernel reads for the frames of `x`: T + kt - 1 of them.

    A centred kernel keeps no state: `x` is then a whole video, or a part whose margins are cut off afterwards.
    """
    if not spec.num_ahead:
        return extend_with_past(x, spec.num_past, address, past, future, spec.time_padding)
    return torch.cat(time_clips(x, spec, address, past), dim=2)


def time_clips(
    x: Float[Tensor, "B C T H W"], spec: ConvSpec, address: str, past: Past = None
) -> list[Float[Tensor, "B C _ H W"]]:
    """The frames of `time_window` as consecutive clips, none of them copied; zeros before causal kernels are left
    out."""
    if spec.time_padding == "zeros_around":
        zeros = torch.zeros_like(x[:, :, :1])
        return [*_repeated(zeros, spec.num_past), x, *_repeated(zeros, spec.num_ahead)]
    if spec.num_ahead:
        return [*_repeated(x[:, :, :1], spec.num_past), x, *_repeated(x[:, :, -1:], spec.num_ahead)]
    if spec.num_past == 0 or (past is None and spec.time_padding == "zeros"):
        return [x]
    return [*_repeated(x[:, :, :1], spec.num_past), x] if past is None else [past[address], x]


def space_window(x: Float[Tensor, "B C T H W"], spec: ConvSpec) -> tuple[Float[Tensor, "B C T Hp Wp"], tuple[int, int]]:
    """The frames with the margins that a kernel reads, and the zeros that the convolution itself must add around them.

    Raises:
        SpecError: the frames are too small to be mirrored.
    """
    margins = spec.kernel[1] // 2, spec.kernel[2] // 2
    if spec.space_padding == "zeros" or margins == (0, 0):
        return x, margins
    if spec.space_padding == "reflect":
        require_mirrored(x, margins)
    return F.pad(x, (margins[1], margins[1], margins[0], margins[0], 0, 0), mode=spec.space_padding), (0, 0)


def require_mirrored(x: Float[Tensor, "B C T H W"], margins: tuple[int, int]) -> None:
    """Refuse frames that are too small to be mirrored.

    Raises:
        SpecError: the frames are too small.
    """
    height, width = x.shape[-2:]
    if height <= margins[0] or width <= margins[1]:
        raise SpecError(
            f"this decoder mirrors frames at their borders, and {height}x{width} positions are too few for that: "
            f"give at least {margins[0] + 1}x{margins[1] + 1} latents"
        )


def remember(
    x: Float[Tensor, "B C T H W"],
    num_past: int,
    address: str,
    past: Past,
    future: Future,
    padding: TimePadding = "zeros",
) -> None:
    """Write the state for the next chunk, as `extend_with_past` does, without building the window."""
    if num_past == 0 or future is None:
        return
    num_frames = x.shape[2]
    if num_frames >= num_past:
        future[address] = x[:, :, num_frames - num_past :].clone()
        return
    if past is not None:
        before = [past[address][:, :, num_frames:]]
    else:
        first = torch.zeros_like(x[:, :, :1]) if padding == "zeros" else x[:, :, :1]
        before = _repeated(first, num_past - num_frames)
    future[address] = torch.cat([*before, x], dim=2)


def draw_(weight: nn.Parameter) -> None:
    """Random weights, as torch's layers draw them; none for a module that is about to get its own (on `meta`)."""
    if not weight.is_meta:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


class Conv(nn.Module):
    """Weight and bias of one layer; `address` is its name in the spec and in the state.

    An operator whose weights are not a dense kernel overrides `channel_axes`, `dense_kernel` and `set_dense_kernel_`,
    so that layers of any operator can be cut, converted and expanded.
    """

    channel_axes: ClassVar[Mapping[str, tuple[int | None, int | None]]] = {"weight": (0, 1), "bias": (0, None)}
    """For each parameter, the axes of the output channels and of the input channels."""

    def __init__(self, spec: ConvSpec, address: str, weight_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec
        self.address = address
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.zeros(spec.out_width))
        draw_(self.weight)

    def dense_kernel(self) -> Float[Tensor, "O C kt kh kw"]:
        """The equivalent dense kernel."""
        return self.weight.reshape(self.spec.out_width, self.spec.in_width, *self.spec.kernel)

    def set_dense_kernel_(self, kernel: Float[Tensor, "O C kt kh kw"]) -> None:
        """Write a dense kernel with as many taps, or the nearest that the operator can represent; the bias stays."""
        self.weight.copy_(kernel.reshape(self.weight.shape))

    def extra_repr(self) -> str:
        s = self.spec
        return f"{s.in_width} -> {s.out_width}, kernel={s.kernel}"


def conv_at(module: nn.Module, path: str) -> Conv:
    """The convolution at a path inside a module."""
    layer = module.get_submodule(path)
    assert isinstance(layer, Conv), f"{path} is no convolution"
    return layer
