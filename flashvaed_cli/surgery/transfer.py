"""First weights of a changed decoder, from the reference's alone and without data: cut, summed, factorised.

This is what pruning without reconstruction gives, the start of the closed-form fit, and the baseline that
the fit is measured against.

Reference: arXiv 2602.19161, sections 3.1 and 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.blocks import Attention, Downsample, ResBlock, Upsample
from flashvaed_cli.decoders.modules.bypass import Bypass
from flashvaed_cli.decoders.modules.coder import CoderT
from flashvaed_cli.decoders.modules.norms import ChannelLayerNorm, ChannelRMSNorm
from flashvaed_cli.decoders.modules.operators import LowRankConv3d, dense_kernel
from flashvaed_cli.decoders.modules.shuffle_blocks import ShuffleUpsample
from flashvaed_cli.decoders.spec.blocks import ShuffleUpsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.decoders.spec.groups import Kept, input_tensors
from flashvaed_cli.decoders.spec.layers import Operator
from flashvaed_cli.errors import SpecError
from flashvaed_cli.numerics.reduced_rank import factorise
from flashvaed_cli.numerics.separable import frame_from_causal, separable_from_dense
from flashvaed_cli.surgery.attention_fit import set_collapsed

Channels = Tensor | None
Norm = ChannelRMSNorm | ChannelLayerNorm


def channel_index(kept: Kept, tensor: str | None) -> Channels:
    """Kept channels of a tensor as an index; None when all are kept."""
    channels = None if tensor is None else kept.get(tensor)
    return None if channels is None else torch.tensor(channels)


def pick(x: Tensor, channels: Channels, dim: int) -> Tensor:
    """The kept channels of a tensor along an axis."""
    return x if channels is None else x.index_select(dim, channels.to(x.device))


@torch.no_grad()
def transfer_weights(reference: CoderT, spec: CoderSpec, kept: Kept) -> CoderT:
    """Build a coder from `spec` with the reference's weights cut to the kept channels.

    A layer whose operator differs gets the data-free conversion: temporal taps summed for `frame2d`, the best
    rank one per input channel for `dwsep3d`, the nearest kernel of the rank for `lowrank3d`. A new 1x1 shortcut
    selects the channels that both sides keep.

    Args:
        kept: tensor address to channels, as indices of the reference's.
    Raises:
        SpecError: a layer of `spec` cannot come from the reference's.
    """
    student = type(reference)(spec).to(next(reference.parameters()).device)
    student.eval().requires_grad_(False)
    inputs = input_tensors(spec)
    for address, block in student.blocks():
        source = reference.at(address)
        before = channel_index(kept, inputs[address])
        inner, after = channel_index(kept, f"{address}.conv1"), channel_index(kept, address)
        if isinstance(block, ResBlock):
            _transfer_resblock(source, block, before, inner, after)
        elif isinstance(block, Attention):
            _transfer_attention(source, block, before, after)
        elif isinstance(block, Upsample):
            if block.temporal is not None:
                assert isinstance(source, Upsample) and source.temporal is not None
                _transfer_conv(source.temporal, block.temporal, before, doubled(before, source.temporal))
            _transfer_conv(source.spatial, block.spatial, before, after)  # type: ignore[union-attr, arg-type]
        elif isinstance(block, ShuffleUpsample):
            _transfer_shuffle(source, block, before, after)
        elif isinstance(block, Downsample):
            assert isinstance(source, Downsample)
            _transfer_conv(source.spatial, block.spatial, before, after)
            if block.temporal is not None and source.temporal is not None:
                _transfer_conv(source.temporal, block.temporal, after, after)
        else:
            if hasattr(block, "norm"):
                _transfer_norm(source.norm, block.norm, before)  # type: ignore[arg-type]
            _transfer_conv(source.conv, block.conv, before, after)  # type: ignore[arg-type]
    for end, stage in spec.bypassed().items():
        _transfer_bypass(
            reference.bypasses[stage.name],  # type: ignore[arg-type]
            student.bypasses[stage.name],  # type: ignore[arg-type]
            channel_index(kept, inputs[f"{stage.name}.0"]),
            channel_index(kept, end),
        )
    return student


def wide_channels(channels: Channels, cell_size: int) -> Channels:
    """Kept outputs of a bypass, or of the layer before a shuffle: the same channels at every position of a cell."""
    if channels is None:
        return None
    return (channels[:, None] * cell_size + torch.arange(cell_size)).flatten()


def _transfer_bypass(source: Bypass, bypass: Bypass, before: Channels, after: Channels) -> None:
    if bypass.conv is None:
        return
    wide = wide_channels(after, source.spec.cell_size)
    weight, bias = source.matrix()
    bypass.conv.weight.copy_(pick(pick(weight, wide, 0), before, 1))
    bypass.conv.bias.copy_(pick(bias, wide, 0))


def doubled(channels: Channels, temporal: nn.Module) -> Channels:
    """Kept outputs of a temporal upsampler: the same channels in both of its halves."""
    if channels is None:
        return None
    return torch.cat([channels, channels + temporal.spec.out_width // 2])  # type: ignore[union-attr, operator]


def _transfer_resblock(source: nn.Module, block: ResBlock, before: Channels, inner: Channels, after: Channels) -> None:
    assert isinstance(source, ResBlock)
    _transfer_norm(source.norm1, block.norm1, before)
    _transfer_conv(source.conv1, block.conv1, before, inner)
    _transfer_norm(source.norm2, block.norm2, inner)
    _transfer_conv(source.conv2, block.conv2, inner, after)
    if block.shortcut_norm is not None and source.shortcut_norm is not None:
        _transfer_norm(source.shortcut_norm, block.shortcut_norm, before)
    for name, channels in (("noise1", inner), ("noise2", after)):
        if hasattr(block, name):
            getattr(block, name).copy_(pick(getattr(source, name), channels, 0))
    if block.shortcut is None:
        return
    if source.shortcut is not None:
        _transfer_conv(source.shortcut, block.shortcut, before, after)
        return
    identity = torch.eye(source.conv1.spec.in_width, device=block.shortcut.weight.device)
    block.shortcut.weight.copy_(pick(pick(identity, after, 0), before, 1))
    block.shortcut.bias.zero_()


def _transfer_attention(source: nn.Module, block: Attention, before: Channels, after: Channels) -> None:
    assert isinstance(source, Attention)
    _transfer_norm(source.norm, block.norm, before)
    if block.proj.in_features != source.proj.in_features:
        weight, outer = (pick(source.qkv.weight, before, 1), pick(source.proj.weight, after, 0))
        bias = pick(source.proj.bias, after, 0)
        set_collapsed(block, weight.flatten(1), source.qkv.bias, outer.flatten(1), bias)
        return
    block.qkv.weight.copy_(pick(source.qkv.weight, before, 1))
    block.qkv.bias.copy_(source.qkv.bias)
    block.proj.weight.copy_(pick(source.proj.weight, after, 0))
    block.proj.bias.copy_(pick(source.proj.bias, after, 0))


def _transfer_norm(source: Norm, norm: Norm, before: Channels) -> None:
    """Gain and shift of the channels that are left; a norm that had no gain begins with one of 1."""
    if norm.gamma is not None and source.gamma is not None:
        norm.gamma.copy_(pick(source.gamma, before, 0))
    if norm.beta is not None and source.beta is not None:
        norm.beta.copy_(pick(source.beta, before, 0))


def _transfer_shuffle(source: nn.Module, block: ShuffleUpsample, before: Channels, after: Channels) -> None:
    """A residual that pruning has parted from its channels becomes part of the kernel's middle."""
    assert isinstance(source, ShuffleUpsample)
    kernel = source.conv.weight
    if source.spec.residual and not block.spec.residual:
        kernel = kernel + residual_kernel(source.spec).to(kernel)
    wide = wide_channels(after, source.spec.cell)
    block.conv.weight.copy_(pick(pick(kernel, wide, 0), before, 1))
    block.conv.bias.copy_(pick(source.conv.bias, wide, 0))


def residual_kernel(spec: ShuffleUpsampleSpec) -> Tensor:
    """The residual of a shuffle as a kernel `[O, C, kt, kh, kw]` that is added to the layer's."""
    conv = spec.conv
    kt, kh, kw = conv.kernel
    kernel = torch.zeros(conv.out_width, conv.in_width, kt, kh, kw)
    kernel[torch.arange(conv.out_width), residual_channels(spec), conv.num_past, kh // 2, kw // 2] = 1
    return kernel


def residual_channels(spec: ShuffleUpsampleSpec) -> Tensor:
    """For every channel of a shuffle's layer, the channel of the input that its residual adds to it."""
    conv, cell = spec.conv, spec.cell
    rows = torch.arange(conv.out_width)
    return (rows // cell) % (conv.in_width // cell) * cell + rows % cell


def _transfer_conv(source: nn.Module, layer: nn.Module, before: Channels, after: Channels) -> None:
    operators: tuple[Operator, Operator] = (source.spec.operator, layer.spec.operator)  # type: ignore[union-attr, assignment]
    weight, bias = source.weight, source.bias
    if operators == ("lowrank3d", "lowrank3d") and source.spec.rank == layer.spec.rank:  # type: ignore[union-attr]
        layer.weight.copy_(pick(weight, after, 0))  # type: ignore[operator, arg-type]
        layer.reduce.copy_(pick(source.reduce, before, 1))  # type: ignore[operator, arg-type]
    elif isinstance(layer, LowRankConv3d):
        kernel = pick(pick(dense_kernel(source), after, 0), before, 1)  # type: ignore[arg-type]
        outer, inner = factorise(kernel.flatten(1), layer.weight.shape[1])
        layer.weight.copy_(outer)
        layer.reduce.copy_(inner.reshape(layer.reduce.shape))
    elif operators[0] == operators[1]:
        if operators[0] == "dwsep3d":
            layer.depthwise.copy_(pick(source.depthwise, before, 0))  # type: ignore[operator, arg-type]
        layer.weight.copy_(pick(pick(weight, after, 0), before, 1))  # type: ignore[operator, arg-type]
    elif operators == ("causal3d", "frame2d"):
        layer.weight.copy_(frame_from_causal(pick(pick(weight, after, 0), before, 1)))  # type: ignore[operator, arg-type]
    elif operators in (("causal3d", "dwsep3d"), ("frame2d", "dwsep3d")):
        dense = weight if weight.ndim == 5 else weight[:, :, None]  # type: ignore[union-attr, index]
        depthwise, pointwise = separable_from_dense(pick(pick(dense, after, 0), before, 1))  # type: ignore[arg-type]
        layer.depthwise.copy_(depthwise[:, None])  # type: ignore[operator]
        layer.weight.copy_(pointwise)  # type: ignore[operator]
    else:
        raise SpecError(f"{layer.address}: {operators[1]} weights cannot come from {operators[0]} ones")
    layer.bias.copy_(pick(bias, after, 0))  # type: ignore[operator, arg-type]
