"""First weights of a changed decoder, from the reference's weights alone: cut, summed, factorised.

They are the result of pruning without reconstruction, the start of the closed-form fit, and the baseline that
the fit is measured against.

Reference: arXiv 2602.19161, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.blocks import Attention, Chain, ConvBlock, Downsample, Head, ResBlock, Upsample
from flashvaed_cli.decoders.modules.bypass import Bypass
from flashvaed_cli.decoders.modules.cell_blocks import CellDownsample, CellUpsample, copied_runs
from flashvaed_cli.decoders.modules.coder import CoderT
from flashvaed_cli.decoders.modules.convolution import conv_at
from flashvaed_cli.decoders.modules.naf_blocks import CellHead, CellStem, Ista, Naf
from flashvaed_cli.decoders.modules.norms import ChannelLayerNorm, Norm
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.modules.shuffle_blocks import ShuffleUpsample, StridedDownsample, UnshuffleDownsample
from flashvaed_cli.decoders.spec.blocks import BlockSpec, CellUpsampleSpec, ShuffleUpsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.decoders.spec.groups import Kept, input_tensors
from flashvaed_cli.errors import SpecError
from flashvaed_cli.numerics.separable import frame_from_causal
from flashvaed_cli.surgery.attention_fit import set_collapsed

Channels = Tensor | None
AnyNorm = Norm | ChannelLayerNorm
Single = ConvBlock | StridedDownsample | UnshuffleDownsample | CellDownsample
ByPaths = Naf | Ista | CellStem | CellHead


def channel_index(kept: Kept, tensor: str | None) -> Channels:
    """Kept channels of a tensor as an index; None when all are kept."""
    channels = None if tensor is None else kept.get(tensor)
    return None if channels is None else torch.tensor(channels)


def inner_channels(kept: Kept, address: str, block: BlockSpec) -> dict[str, Channels]:
    """Kept channels of the tensors inside a block."""
    return {name: channel_index(kept, f"{address}.{name}") for name in block.inner_tensors}


def pick(x: Tensor, channels: Channels, dim: int) -> Tensor:
    """The kept channels of a tensor along an axis."""
    return x if channels is None else x.index_select(dim, channels.to(x.device))


class Cut(NamedTuple):
    """The kept channels that enter a block, those of the tensors inside it, and those that leave it."""

    before: Channels
    inner: Mapping[str, Channels]
    after: Channels


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
    for address, block in spec.blocks():
        inner = inner_channels(kept, address, block)
        cut = Cut(channel_index(kept, inputs[address]), inner, channel_index(kept, address))
        TRANSFERS[block.kind](reference.at(address), student.at(address), cut)
    for end, stage in spec.bypassed().items():
        before, after = channel_index(kept, inputs[f"{stage.name}.0"]), channel_index(kept, end)
        _transfer_bypass(reference.bypass_of(stage.name), student.bypass_of(stage.name), before, after)
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


def doubled(channels: Channels, temporal: Conv) -> Channels:
    """Kept outputs of a temporal upsampler: the same channels in both of its halves."""
    if channels is None:
        return None
    return torch.cat([channels, channels + temporal.spec.out_width // 2])


def _transfer_resblock(source: ResBlock, block: ResBlock, cut: Cut) -> None:
    before, inner, after = cut.before, cut.inner["conv1"], cut.after
    _transfer_norm(source.norm1, block.norm1, before)
    _transfer_conv(source.conv1, block.conv1, before, inner)
    _transfer_norm(source.norm2, block.norm2, inner)
    _transfer_conv(source.conv2, block.conv2, inner, after)
    if block.shortcut_norm is not None and source.shortcut_norm is not None:
        _transfer_norm(source.shortcut_norm, block.shortcut_norm, before)
    for name, channels in (("noise1", inner), ("noise2", after)):
        if hasattr(block, name):
            getattr(block, name).copy_(pick(getattr(source, name), channels, 0))
    _transfer_shortcut(source.shortcut, block.shortcut, source.conv1.spec.in_width, cut)


def _transfer_chain(source: Chain, block: Chain, cut: Cut) -> None:
    ends = (cut.before, *cut.inner.values(), cut.after)
    for i, (theirs, ours) in enumerate(zip(source.convolutions(), block.convolutions(), strict=True)):
        _transfer_conv(theirs, ours, ends[i], ends[i + 1])
    _transfer_shortcut(source.shortcut, block.shortcut, source.spec.in_width, cut)


def _transfer_shortcut(source: Conv | None, shortcut: Conv | None, width: int, cut: Cut) -> None:
    """An identity over `width` channels that has become a 1x1 selects the channels that both sides keep."""
    if shortcut is None:
        return
    if source is not None:
        _transfer_conv(source, shortcut, cut.before, cut.after)
        return
    identity = torch.eye(width, device=shortcut.weight.device)
    shortcut.weight.copy_(pick(pick(identity, cut.after, 0), cut.before, 1))
    shortcut.bias.zero_()


def _transfer_attention(source: Attention, block: Attention, cut: Cut) -> None:
    _transfer_norm(source.norm, block.norm, cut.before)
    if block.proj.in_features != source.proj.in_features:
        weight, outer = (pick(source.qkv.weight, cut.before, 1), pick(source.proj.weight, cut.after, 0))
        bias = pick(source.proj.bias, cut.after, 0)
        set_collapsed(block, weight.flatten(1), source.qkv.bias, outer.flatten(1), bias)
        return
    block.qkv.weight.copy_(pick(source.qkv.weight, cut.before, 1))
    block.qkv.bias.copy_(source.qkv.bias)
    block.proj.weight.copy_(pick(source.proj.weight, cut.after, 0))
    block.proj.bias.copy_(pick(source.proj.bias, cut.after, 0))


def _transfer_upsample(source: Upsample, block: Upsample, cut: Cut) -> None:
    if block.temporal is not None:
        assert source.temporal is not None
        _transfer_conv(source.temporal, block.temporal, cut.before, doubled(cut.before, source.temporal))
    _transfer_conv(source.spatial, block.spatial, cut.before, cut.after)


def _transfer_downsample(source: Downsample, block: Downsample, cut: Cut) -> None:
    _transfer_conv(source.spatial, block.spatial, cut.before, cut.after)
    if block.temporal is not None and source.temporal is not None:
        _transfer_conv(source.temporal, block.temporal, cut.after, cut.after)


def _transfer_head(source: Head, block: Head, cut: Cut) -> None:
    if source.norm is not None and block.norm is not None:
        _transfer_norm(source.norm, block.norm, cut.before)
    _transfer_conv(source.conv, block.conv, cut.before, cut.after)


def _transfer_single(source: Single, block: Single, cut: Cut) -> None:
    _transfer_conv(source.conv, block.conv, cut.before, cut.after)


def gated(channels: Channels, width: int) -> Channels:
    """Kept outputs of the layer before gates: the same channels of the values and of their gates."""
    return None if channels is None else torch.cat([channels, channels + width])


def _transfer_parts(source: ByPaths, block: ByPaths, cut: Cut) -> None:
    """For blocks that name their parts by paths: copy all but the layers around pruned inner tensors, which are cut."""
    spec, old = block.spec, source.spec
    ends: dict[str, list[Channels]] = {name: [None, None] for name in spec.layers}
    for name, inner in old.inner_tensors.items():
        ends[inner.producer][1] = gated(cut.inner[name], inner.width)
        ends[inner.reader.layer][0] = cut.inner[name]
    for name, parameter in source.named_parameters():
        place = name.rpartition(".")[0]
        if place not in ends:
            block.get_parameter(name).copy_(parameter)
    for name, (before, after) in ends.items():
        _transfer_conv(conv_at(source, name), conv_at(block, name), before, after)


def _transfer_norm(source: AnyNorm, norm: AnyNorm, before: Channels) -> None:
    """Gain and shift of the kept channels; where the source has no gain, the norm keeps its gain of 1."""
    if norm.gamma is not None and source.gamma is not None:
        norm.gamma.copy_(pick(source.gamma, before, 0))
    if norm.beta is not None and source.beta is not None:
        norm.beta.copy_(pick(source.beta, before, 0))


def _transfer_shuffle(source: ShuffleUpsample | CellUpsample, block: ShuffleUpsample | CellUpsample, cut: Cut) -> None:
    """A residual whose channels pruning has changed becomes part of the kernel's middle tap."""
    kernel = source.conv.weight
    if source.spec.residual and not block.spec.residual:
        kernel = kernel + residual_kernel(source.spec).to(kernel)
    wide = wide_channels(cut.after, source.spec.cell)
    block.conv.weight.copy_(pick(pick(kernel, wide, 0), cut.before, 1))
    block.conv.bias.copy_(pick(source.conv.bias, wide, 0))


def _transfer_cells(source: CellUpsample, block: CellUpsample, cut: Cut) -> None:
    """The same, and the layer of a video's first frame."""
    _transfer_shuffle(source, block, cut)
    if block.first is not None:
        weight, bias = first_matrix(source)
        wide = wide_channels(cut.after, source.spec.first_cell)
        weight = pick(pick(weight, wide, 0), cut.before, 1)
        block.first.weight.copy_(weight.reshape(block.first.weight.shape))
        block.first.bias.copy_(pick(bias, wide, 0))


def residual_kernel(spec: ShuffleUpsampleSpec | CellUpsampleSpec) -> Tensor:
    """The residual of a shuffle as a kernel `[O, C, kt, kh, kw]` that is added to the layer's."""
    conv = spec.conv
    kt, kh, kw = conv.kernel
    kernel = torch.zeros(conv.out_width, conv.in_width, kt, kh, kw)
    kernel[torch.arange(conv.out_width), residual_channels(spec), conv.num_past, kh // 2, kw // 2] = 1
    return kernel


def residual_channels(spec: ShuffleUpsampleSpec | CellUpsampleSpec) -> Tensor:
    """For every channel of a shuffle's layer, the channel of the input that its residual adds to it."""
    conv, cell = spec.conv, spec.cell
    if isinstance(spec, CellUpsampleSpec):
        return _copied(spec, cell)
    rows = torch.arange(conv.out_width)
    return (rows // cell) % (conv.in_width // cell) * cell + rows % cell


def _copied(spec: CellUpsampleSpec, num_positions: int) -> Tensor:
    """The input's channels in the order in which a residual with so many runs copies them."""
    channels = torch.arange(spec.conv.in_width, dtype=torch.float64).view(1, -1, 1, 1, 1)
    return copied_runs(channels, num_positions, spec.out_width).flatten().long()


def first_matrix(block: CellUpsample) -> tuple[Float[Tensor, "Cf C"], Float[Tensor, " Cf"]]:
    """What is added to a video's first frame beside the kernel, into which the residual of later frames has been put:
    the layer of first frames, or the difference of the two residuals."""
    spec = block.spec
    if block.first is not None:
        return block.first.dense_kernel().flatten(1), block.first.bias
    rows = torch.arange(spec.out_width * spec.first_cell)
    weight = block.conv.weight.new_zeros(len(rows), spec.conv.in_width)
    if spec.residual:
        weight[rows, _copied(spec, spec.first_cell)] += 1
        weight[rows, residual_channels(spec)[:: spec.factor[0]]] -= 1
    return weight, weight.new_zeros(len(rows))


TRANSFERS: dict[str, Callable[[Any, Any, Cut], None]] = {
    "conv": _transfer_single,
    "resblock": _transfer_resblock,
    "chain": _transfer_chain,
    "attention": _transfer_attention,
    "upsample": _transfer_upsample,
    "shuffle_upsample": _transfer_shuffle,
    "downsample": _transfer_downsample,
    "strided_downsample": _transfer_single,
    "unshuffle_downsample": _transfer_single,
    "cell_upsample": _transfer_cells,
    "cell_downsample": _transfer_single,
    "head": _transfer_head,
    "naf": _transfer_parts,
    "ista": _transfer_parts,
    "cell_stem": _transfer_parts,
    "cell_head": _transfer_parts,
}
"""How a block of each kind gets its weights from the reference's block, on the kept channels."""


def _transfer_conv(source: Conv, layer: Conv, before: Channels, after: Channels) -> None:
    """The source's weights on the kept channels; of another operator, or another rank, the nearest to its kernel."""
    if (source.spec.operator, source.spec.rank) != (layer.spec.operator, layer.spec.rank):
        if source.spec.kernel[0] < layer.spec.kernel[0]:
            raise SpecError(
                f"{layer.address}: {layer.spec.operator} weights cannot come from {source.spec.operator} ones"
            )
        set_kernel_(layer, cut_kernel(source, before, after))
        layer.bias.copy_(pick(source.bias, after, 0))
        return
    for name, axes in layer.channel_axes.items():
        weight = source.get_parameter(name)
        for axis, channels in zip(axes, (after, before), strict=True):
            weight = weight if axis is None else pick(weight, channels, axis)
        layer.get_parameter(name).copy_(weight)


def cut_kernel(source: Conv, before: Channels, after: Channels) -> Float[Tensor, "o c kt kh kw"]:
    """The dense kernel of a layer, on the kept channels of its input and its output."""
    return pick(pick(source.dense_kernel(), after, 0), before, 1)


def set_kernel_(layer: Conv, kernel: Float[Tensor, "O C kt kh kw"]) -> None:
    """Write the weights nearest to a dense kernel, without data; a single temporal tap takes the sum of all."""
    if layer.spec.kernel[0] < kernel.shape[2]:
        kernel = frame_from_causal(kernel)[:, :, None]
    layer.set_dense_kernel_(kernel)
