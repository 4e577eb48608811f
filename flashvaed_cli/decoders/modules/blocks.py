"""Blocks: the units of a stage. Each is built from its spec and named by its address.

Every block maps `(x, past, future)` to `y`, with the streaming contract of `operators.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.bands import band_size, run_in_bands
from flashvaed_cli.decoders.modules.cell_blocks import CellDownsample, CellUpsample
from flashvaed_cli.decoders.modules.convolution import conv_at, remember
from flashvaed_cli.decoders.modules.naf_blocks import CellHead, CellStem, Ista, Naf
from flashvaed_cli.decoders.modules.narrow_upsampler import doubling_kernel, enlarged_sum, single_kernel
from flashvaed_cli.decoders.modules.norms import ChannelLayerNorm, activate, build_norm, norm_silu
from flashvaed_cli.decoders.modules.operators import (
    Conv,
    Future,
    Past,
    batch_as_frames,
    build_conv,
    frames_as_batch,
)
from flashvaed_cli.decoders.modules.shuffle_blocks import ShuffleUpsample, StridedDownsample, UnshuffleDownsample
from flashvaed_cli.decoders.predict.attention import queries_at_once
from flashvaed_cli.decoders.predict.bands import BandShape
from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    BlockSpec,
    ChainSpec,
    ConvBlockSpec,
    DownsampleSpec,
    HeadSpec,
    ResBlockSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.layers import LatentEntrySpec
from flashvaed_cli.numerics.products import RowLinear, by_convolution, is_faster_by_convolution

Clip = Float[Tensor, "B C T H W"]
MappedClip = Float[Tensor, "B O To Ho Wo"]  # a block's output: width, frames and size may differ


class ConvBlock(nn.Module):
    """A single convolution, with the entry and the activation of its spec."""

    def __init__(self, spec: ConvBlockSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.conv = build_conv(spec.conv, f"{address}.conv")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        return activate(self.conv(self.before_conv(x), past, future), self.spec.activation)

    def before_conv(self, x: Clip) -> Clip:
        """The convolution's input: raw latents normalized and clamped if the spec has an entry."""
        return x if self.spec.entry is None else enter_latents(x, self.spec.entry)


class ResBlock(nn.Module):
    """norm1, SiLU, conv1, norm2, SiLU, conv2, plus the shortcut, which may have a norm of its own before it."""

    def __init__(self, spec: ResBlockSpec, address: str) -> None:
        super().__init__()
        norms = {name: build_norm(width, norm) for name, (norm, width) in spec.norms.items()}
        self.norm1 = norms["norm1"]
        self.conv1 = build_conv(spec.conv1, f"{address}.conv1")
        self.norm2 = norms["norm2"]
        self.conv2 = build_conv(spec.conv2, f"{address}.conv2")
        self.shortcut_norm = ChannelLayerNorm(spec.conv1.in_width) if spec.shortcut_norm else None
        self.shortcut = None if spec.shortcut is None else build_conv(spec.shortcut, f"{address}.shortcut")
        self.band_shape = BandShape.of(spec)
        if spec.noise:  # kept for programs that add the noise; here it is left out
            self.register_buffer("noise1", torch.zeros(spec.conv1.out_width))
            self.register_buffer("noise2", torch.zeros(spec.conv2.out_width))

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        size = band_size(self.band_shape, x)
        if size is None or self.band_shape is None:
            return self._whole(x, past, future)
        layers = [layer for layer in (self.conv1, self.conv2, self.shortcut) if layer is not None]
        stateful = (layer.address for layer in layers if layer.spec.num_past)
        own = None if past is None else {address: past[address] for address in stateful}
        return run_in_bands(self._whole, self.band_shape.halo, size, x, own, future)

    def _whole(self, x: Clip, past: Past, future: Future) -> MappedClip:
        h = self.conv1(norm_silu(self.norm1, x), past, future)
        h = self.conv2(norm_silu(self.norm2, h), past, future)
        return _add(h, x if self.shortcut is None else self.shortcut(self.before_shortcut(x), past, future))

    def before_shortcut(self, x: Float[Tensor, "B C *P"]) -> Float[Tensor, "B C *P"]:
        """The shortcut's input."""
        return x if self.shortcut_norm is None else self.shortcut_norm(x)


class Chain(nn.Module):
    """Two or three convolutions with ReLU between them, plus the shortcut, then ReLU if the spec says so."""

    def __init__(self, spec: ChainSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        for name in spec.path:
            self.add_module(name, build_conv(spec.layers[name], f"{address}.{name}"))
        self.shortcut = None if spec.shortcut is None else build_conv(spec.shortcut, f"{address}.shortcut")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        h = x
        for index, conv in enumerate(self.convolutions()):
            h = conv(h if index == 0 else activate(h, "relu"), past, future)
        y = _add(h, x if self.shortcut is None else self.shortcut(x, past, future))
        return activate(y, self.spec.activation)

    def convolutions(self) -> list[Conv]:
        """Those of the main path, in order."""
        return [conv_at(self, name) for name in self.spec.path]


class Attention(nn.Module):
    """Single-head self-attention over the positions of each frame, or of it and all earlier ones; residual.

    Over a clip, the state is the keys and values of all frames so far, `[B, 2 I, T, H, W]`.
    """

    def __init__(self, spec: AttentionSpec, address: str) -> None:
        super().__init__()
        self.context = spec.context
        self.address = address
        self.norm = build_norm(spec.width, spec.norm)
        self.qkv = RowLinear(spec.width, 3 * spec.inner_width)
        self.proj = RowLinear(spec.inner_width, spec.width)

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        b, _, t, h, w = x.shape
        frames = frames_as_batch(self.norm(x)).flatten(2).transpose(1, 2)  # [BT, HW, C]
        q, k, v = self.qkv(frames).chunk(3, dim=-1)
        if self.context == "clip":
            q, k, v = (rows.unflatten(0, (b, t)).flatten(1, 2) for rows in (q, k, v))  # [B, T HW, I]
            k, v = self._with_earlier(k, v, x, past, future)
            mixed = self._over_clip(q, k, v, x).unflatten(1, (t, h * w)).flatten(0, 1)
        else:
            mixed = _attend(q, k, v)
        y = self.proj(mixed).transpose(1, 2).unflatten(2, (h, w))  # [BT, C, H, W]
        return x + batch_as_frames(y, x)

    def _with_earlier(
        self, k: Float[Tensor, "B P I"], v: Float[Tensor, "B P I"], x: Clip, past: Past, future: Future
    ) -> tuple[Float[Tensor, "B K I"], Float[Tensor, "B K I"]]:
        """Keys and values of all frames so far, those of `x` and of earlier chunks, which are remembered."""
        if past is not None:
            earlier = past[self.address].flatten(2).transpose(1, 2).chunk(2, dim=2)
            k, v = torch.cat([earlier[0], k], dim=1), torch.cat([earlier[1], v], dim=1)
        if future is not None:
            future[self.address] = torch.cat([k, v], dim=2).transpose(1, 2).unflatten(2, (-1, *x.shape[3:]))
        return k, v

    def _over_clip(
        self, q: Float[Tensor, "B Q I"], k: Float[Tensor, "B K I"], v: Float[Tensor, "B K I"], x: Clip
    ) -> Float[Tensor, "B Q I"]:
        """Frame after frame, each with the keys up to its own: half the products of a mask, and no mask."""
        positions, earlier = x.shape[3] * x.shape[4], k.shape[1] - q.shape[1]
        starts = range(0, q.shape[1], positions)
        ends = [start + positions for start in starts]
        mixed = [
            _attend(q[:, start:end], k[:, : earlier + end], v[:, : earlier + end])
            for start, end in zip(starts, ends, strict=True)
        ]
        return torch.cat(mixed, dim=1)


def _attend(q: Float[Tensor, "B Q C"], k: Float[Tensor, "B K C"], v: Float[Tensor, "B K C"]) -> Float[Tensor, "B Q C"]:
    """Scaled dot-product attention with one head."""
    if not is_faster_by_convolution(q, q.numel() * k.shape[1]):
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_queries = queries_at_once(k.shape[1])
    for rows, keys, values, out in zip(q, k, v, mixed, strict=True):
        keys, values = keys * keys.shape[1] ** -0.5, values.T.contiguous()
        for part, out_part in zip(rows.split(num_queries), out.split(num_queries), strict=True):
            out_part.copy_(by_convolution(torch.softmax(by_convolution(part, keys), dim=1), values))
    return mixed


class Upsample(nn.Module):
    """Double the frames (all but the first of the video), then the size of each frame.

    The first frame of a video skips `temporal`, which does not see it: 1 + 2 (T - 1) frames. With `grows_first` it is
    treated like any other: 2 T frames. With `repeats_frames` all frames but the first are repeated.
    """

    def __init__(self, spec: UpsampleSpec, address: str) -> None:
        super().__init__()
        self.grows_first = spec.grows_first
        self.repeats_frames = spec.repeats_frames
        self.is_folded = spec.is_folded
        self.temporal = None if spec.temporal is None else build_conv(spec.temporal, f"{address}.temporal")
        self.spatial = build_conv(spec.spatial, f"{address}.spatial")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        num_single = int(past is None and not self.grows_first)
        if self.is_folded and x.shape[2] > num_single and self._may_fold():
            return self._folded(x, num_single, past, future)
        x = self.double_frames(x, past, future)
        return self.spatial(x if self.spatial.spec.enlarges else self.enlarge(x), past, future)

    def _folded(self, x: Clip, num_single: int, past: Past, future: Future) -> MappedClip:
        """The same with both kernels as one; the first `num_single` frames skip `temporal`."""
        assert self.temporal is not None
        spatial, num_outputs = (self.spatial.weight, self.spatial.bias), self.spatial.spec.out_width
        kernel = doubling_kernel((self.temporal.weight, self.temporal.bias), spatial)
        single, rest = x[:, :, :num_single], x[:, :, num_single:]
        num_past = self.temporal.spec.num_past
        before = past[self.temporal.address] if past is not None and num_past else None
        frames = enlarged_sum(rest, before, kernel, num_outputs)
        remember(rest, num_past, self.temporal.address, past, future)
        if num_single == 0:
            return frames
        return torch.cat([enlarged_sum(single, None, single_kernel(spatial), num_outputs), frames], dim=2)

    def _may_fold(self) -> bool:
        """Whether nobody needs what is between the layers: no gradient, no compiler, and no hook on a layer."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        layers = (self.temporal, self.spatial)
        return not any(layer is not None and (layer._forward_hooks or layer._forward_pre_hooks) for layer in layers)

    @staticmethod
    def enlarge(x: Clip) -> MappedClip:
        """Every pixel as a square of 2x2."""
        frames = F.interpolate(frames_as_batch(x), scale_factor=2, mode="nearest")
        return batch_as_frames(frames, x)

    def double_frames(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        """The temporal part alone: 1 + 2 (T - 1) frames for a first chunk (2 T if it grows), 2 T for a later one."""
        if self.repeats_frames:
            return _repeat_frames(x, keeps_first=past is None)
        if self.temporal is None:
            return x
        if past is not None or self.grows_first:
            return self._interleave(self.temporal(x, past, future))
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2] == 0:
            if future is not None and (num_past := self.temporal.spec.num_past):
                b, c, _, h, w = x.shape
                future[self.temporal.address] = x.new_zeros(b, c, num_past, h, w)
            return first
        return torch.cat([first, self._interleave(self.temporal(rest, None, future))], dim=2)

    @staticmethod
    def _interleave(x: Clip) -> MappedClip:
        """`[B, 2C, T, H, W]` to `[B, C, 2T, H, W]`: the two halves of the channels become alternating frames."""
        if x.stride(1) != 1 or torch.compiler.is_compiling():
            return torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)
        pairs = x.permute(0, 2, 3, 4, 1).unflatten(4, (2, -1))  # [B, T, H, W, 2, C]
        return pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)  # stays channels-last


def _repeat_frames(x: Clip, *, keeps_first: bool) -> MappedClip:
    """Every frame twice; with `keeps_first` the first one only once."""
    twice = x.unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).flatten(2, 3)
    return twice[:, :, 1:] if keeps_first else twice


class Downsample(nn.Module):
    """Halve the size of each frame, then the number of frames (without the video's first): 1 + (T - 1) / 2."""

    def __init__(self, spec: DownsampleSpec, address: str) -> None:
        super().__init__()
        self.spatial = build_conv(spec.spatial, f"{address}.spatial")
        self.temporal = None if spec.temporal is None else build_conv(spec.temporal, f"{address}.temporal")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        x = self.halve_size(x)
        return x if self.temporal is None else self._halve_frames(x, past, future)

    def halve_size(self, x: Clip) -> MappedClip:
        """The spatial part alone: a kernel around every second row and column, zeros below and right of the frame."""
        frames = F.pad(frames_as_batch(x), (0, 1, 0, 1))
        frames = F.conv2d(frames, self.spatial.weight, self.spatial.bias, stride=2)
        return batch_as_frames(frames, x)

    def _halve_frames(self, x: Clip, past: Past, future: Future) -> MappedClip:
        assert self.temporal is not None
        address = self.temporal.address
        if future is not None:
            future[address] = x[:, :, -1:].clone()
        window = x if past is None else torch.cat([past[address], x], dim=2)
        if window.shape[2] == 1:
            return window
        halved = F.conv3d(window, self.temporal.weight, self.temporal.bias, stride=(2, 1, 1))
        return torch.cat([x[:, :, :1], halved], dim=2) if past is None else halved


class Head(nn.Module):
    """norm (if the spec has one), activation and conv, on the frames that are not dropped."""

    def __init__(self, spec: HeadSpec, address: str) -> None:
        super().__init__()
        self.spec = spec
        self.norm = None if spec.norm is None else build_norm(spec.conv.in_width, spec.norm)
        self.conv = build_conv(spec.conv, f"{address}.conv")

    def forward(self, x: Clip, past: Past = None, future: Future = None) -> MappedClip:
        return self.conv(self.before_conv(x, is_first=past is None), past, future)

    def before_conv(self, x: Clip, *, is_first: bool = True) -> MappedClip:
        """The convolution's input; `is_first`: the video begins with this chunk."""
        if is_first and self.spec.lead_frames:
            x = x[:, :, self.spec.lead_frames :]
        if self.norm is None:  # the input is not the head's to overwrite
            return activate(x, self.spec.activation, in_place=False)
        if self.spec.activation == "silu":
            return norm_silu(self.norm, x)
        return activate(self.norm(x), self.spec.activation)


def enter_latents(x: Clip, entry: LatentEntrySpec) -> Clip:
    """Raw latents, normalized and softly clamped as the entry says, as a new tensor."""
    if entry.mean:
        mean, std = (x.new_tensor(values).view(1, -1, 1, 1, 1) for values in (entry.mean, entry.std))
        x = (x - mean) / std
    return x if entry.limit is None else entry.limit * torch.tanh(x / entry.limit)


def _add(new: Clip, residual: Clip) -> Clip:
    """The sum, written into `new` if no gradient needs it: nothing else holds a convolution's output."""
    if torch.is_grad_enabled() or new.dtype != residual.dtype:
        return new + residual
    return new.add_(residual)


BLOCKS: dict[str, type[nn.Module]] = {
    "conv": ConvBlock,
    "resblock": ResBlock,
    "chain": Chain,
    "attention": Attention,
    "upsample": Upsample,
    "shuffle_upsample": ShuffleUpsample,
    "downsample": Downsample,
    "strided_downsample": StridedDownsample,
    "unshuffle_downsample": UnshuffleDownsample,
    "cell_upsample": CellUpsample,
    "cell_downsample": CellDownsample,
    "head": Head,
    "naf": Naf,
    "ista": Ista,
    "cell_stem": CellStem,
    "cell_head": CellHead,
}


def build_block(spec: BlockSpec, address: str) -> nn.Module:
    """The module of one block."""
    return BLOCKS[spec.kind](spec, address)
