"""Channel groups: which tensors of a decoder carry the same channels.

A *tensor* is named by the address of the module whose output it is: a block (`up2.0`, the residual stream after it) or
a layer (`up2.0.conv1`, the inside of a residual block). Channels are chosen once per group, for all its tensors. Groups
are derived from the spec alone, so every family has them.

Reference: arXiv 2602.19161, section 3.1; the residual stream of a stage is one group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from flashvaed_cli.decoders.spec.addresses import stage_of
from flashvaed_cli.decoders.spec.block import InnerTensor
from flashvaed_cli.decoders.spec.blocks import BlockSpec, ShuffleUpsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec

Kept = dict[str, tuple[int, ...]]
"""Tensor address to its kept channels, as indices of the reference's channels; absent: all."""


@dataclass(frozen=True)
class ChannelGroup:
    """Tensors of one stage that share their channels. `name` is `up2.stream`, `up2.entry`, `up2.0.inner` or,
    of the second layer of a chain, `up2.0.inner2`.

    `run`: number of consecutive channels that stay or go together, because a GroupNorm that reads them takes their
    statistics together. With whole groups kept, the norm's output on these does not change.
    """

    name: str
    stage: str
    width: int
    tensors: tuple[str, ...]
    run: int = 1


def channel_groups(spec: CoderSpec) -> list[ChannelGroup]:
    """All groups in forward order. The latent, the 1x1 layer on it and the pixels belong to none."""
    found: dict[str, ChannelGroup] = {}

    def add(name: str, stage: str, width: int, tensor: str) -> None:
        known = found.get(name)
        tensors = (tensor,) if known is None else (*known.tensors, tensor)
        found[name] = ChannelGroup(name, stage, width, tensors)

    blocks = list(spec.blocks())
    for i, (address, block) in enumerate(blocks):
        stage = stage_of(address)
        for name, inner in block.inner_tensors.items():
            add(f"{address}.{inner.group}", stage, inner.width, f"{address}.{name}")
        if i + 1 < len(blocks):
            owner = _stream_owner(stage, block, *blocks[i + 1])
            if owner is not None:
                add(owner, stage_of(owner), block.out_width, address)
    return [replace(group, run=_run_of(spec, group)) for group in found.values()]


def _run_of(spec: CoderSpec, group: ChannelGroup) -> int:
    """The smallest number of channels that holds whole groups of every GroupNorm that reads a group's tensors."""
    blocks, run = dict(spec.blocks()), 1
    for consumer in consumers(spec, group):
        if consumer.norm is not None:
            address, _, name = consumer.norm.rpartition(".")
            norm, width = blocks[address].norms.get(name, (None, group.width))
            if norm is not None and norm.groups is not None:
                run = math.lcm(run, max(width // norm.groups, 1))
    return run


def _stream_owner(stage: str, block: BlockSpec, next_address: str, following: BlockSpec) -> str | None:
    """The group of the tensor between two blocks; None where it cannot be pruned."""
    if block.kind == "head" or block.kind == following.kind == "conv":
        return None  # pixels, or the latent's own channels
    if block.holds_channels or following.holds_channels:
        return None  # those that a layer norm reads in branches
    next_stage = stage_of(next_address)
    if isinstance(following, ShuffleUpsampleSpec) and next_stage == stage:
        return f"{stage}.entry"  # other channels than those after the resampler
    if not block.ends_stream or next_stage == stage:
        return f"{stage}.stream"
    changes_width = "shortcut" in following.layers
    return f"{next_stage}.entry" if changes_width else f"{next_stage}.stream"


@dataclass(frozen=True)
class Consumer:
    """Something that reads a tensor of a group.

    `layer` is its address, `norm` that of the norm before it (with SiLU, but before attention or a shortcut without);
    None: it reads the tensor as it is. Without a layer it is an identity shortcut or a bypass of copies, which carries
    all channels on into another group.
    """

    layer: str | None
    norm: str | None


def producers(spec: CoderSpec, group: ChannelGroup) -> list[str]:
    """Addresses of the layers whose outputs (or the sums of these) are the tensors of a group.

    The layer of a bypass, or before a shuffle, has as many consecutive outputs per channel as a cell has positions.
    """
    blocks, bypassed = dict(spec.blocks()), spec.bypassed()
    found: list[str] = []
    for tensor in group.tensors:
        inside_a_block = tensor not in blocks
        if inside_a_block:
            address, inner = _inner_tensor(blocks, tensor)
            found.append(f"{address}.{inner.producer}")
        else:
            found += [f"{tensor}.{name}" for name in blocks[tensor].writers]
        if tensor in bypassed and _bypass_conv(bypassed[tensor]) is not None:
            found.append(f"{tensor}.bypass")
    return found


def _inner_tensor(blocks: Mapping[str, BlockSpec], tensor: str) -> tuple[str, InnerTensor]:
    """The block that a tensor is inside of, by address, and the tensor."""
    stage, index, name = tensor.split(".", 2)
    address = f"{stage}.{index}"
    return address, blocks[address].inner_tensors[name]


def is_gated(spec: CoderSpec, tensor: str) -> bool:
    """Whether a tensor's producer has first all values, then all gates, rather than each channel's outputs together."""
    blocks = dict(spec.blocks())
    return tensor not in blocks and _inner_tensor(blocks, tensor)[1].gated


def _bypass_conv(stage: StageSpec) -> ConvSpec | None:
    return None if stage.bypass is None else stage.bypass.conv


def consumers(spec: CoderSpec, group: ChannelGroup) -> list[Consumer]:
    """All consumers of the tensors of a group, in forward order.

    An identity that carries a tensor on within its group is not one; the next tensor's consumers are listed instead. A
    temporal upsampler keeps the channels of its input, so the layer after it (`spatial`) reads them too.
    """
    blocks = list(spec.blocks())
    if group.tensors[0] not in dict(blocks):
        insides = [_inner_tensor(dict(blocks), tensor) for tensor in group.tensors]
        return [
            Consumer(f"{address}.{inner.reader.layer}", inner.reader.norm and f"{address}.{inner.reader.norm}")
            for address, inner in insides
        ]
    found: list[Consumer] = []
    beginning = {f"{stage.name}.0": (end, stage) for end, stage in spec.bypassed().items()}
    for (tensor, _), (address, block) in pairwise(blocks):
        if tensor in group.tensors:
            found += _readers(address, block, leaves_group=address not in group.tensors)
            if address in beginning:
                end, stage = beginning[address]
                found.append(Consumer(None if _bypass_conv(stage) is None else f"{end}.bypass", None))
    return found


def _readers(address: str, block: BlockSpec, *, leaves_group: bool) -> Iterator[Consumer]:
    """The consumers of a block's input."""
    for one in block.readers:
        yield Consumer(f"{address}.{one.layer}", one.norm and f"{address}.{one.norm}")
    if block.carries_input and leaves_group:
        yield Consumer(None, None)


def input_tensors(spec: CoderSpec) -> dict[str, str | None]:
    """Block address to the address of the block whose output it reads; None for the first block."""
    before: str | None = None
    inputs: dict[str, str | None] = {}
    for address, _ in spec.blocks():
        inputs[address] = before
        before = address
    return inputs


def tensor_widths(spec: CoderSpec) -> dict[str, int]:
    """Width of every tensor that belongs to a group."""
    return {tensor: group.width for group in channel_groups(spec) for tensor in group.tensors}


def compose_kept(first: Kept, second: Kept) -> Kept:
    """Kept channels after two steps: `second` holds indices of the channels that `first` kept."""
    composed = dict(first)
    for tensor, kept in second.items():
        before = first.get(tensor)
        composed[tensor] = tuple(kept) if before is None else tuple(before[i] for i in kept)
    return composed
