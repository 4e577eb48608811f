"""Channel groups: which tensors of a decoder carry the same channels.

A *tensor* is named by the address of the module that puts it out: a block (`up2.0`, the residual stream
behind it) or a layer (`up2.0.conv1`, the inside of a residual block). A group is chosen jointly: one kept
set for all its tensors. Derived from the spec alone, so every family has them.

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
"""Tensor address to the channels that are left, as indices of the reference's channels; absent: all."""


@dataclass(frozen=True)
class ChannelGroup:
    """Tensors of one stage that share their channels. `name` is `up2.stream`, `up2.entry`, `up2.0.inner` or,
    of the second layer of a chain, `up2.0.inner2`.

    `run`: channels that stay or go together, as they follow each other: those whose statistics a GroupNorm that reads
    them takes as one. A norm over the groups that are left whole gives what it gave.
    """

    name: str
    stage: str
    width: int
    tensors: tuple[str, ...]
    run: int = 1


def channel_groups(spec: CoderSpec) -> list[ChannelGroup]:
    """All groups in forward order. The latent, its 1x1 and the pixels belong to none."""
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
    """The smallest number of channels that is whole to every GroupNorm that reads the tensors of a group."""
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
    if following.kind == "conv" or block.holds_channels or following.holds_channels:
        return None  # the latent's own channels, or those that a layer norm reads in branches
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

    `layer` is its address, `norm` that of the norm (with SiLU, or before attention or a shortcut without) in front of
    it; None:
    it reads the tensor as it is. Without a layer it is an identity shortcut or a bypass of copies, which carries
    all channels on into another group.
    """

    layer: str | None
    norm: str | None


def producers(spec: CoderSpec, group: ChannelGroup) -> list[str]:
    """Addresses of the layers whose outputs, added up where there are several, are the tensors of a group.

    The layer of a bypass, or before a shuffle, gives as many outputs per channel as a cell has positions, one after
    another.
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
    """The address of the block that a tensor is inside of, and what is known of it there."""
    stage, index, name = tensor.split(".", 2)
    address = f"{stage}.{index}"
    return address, blocks[address].inner_tensors[name]


def is_gated(spec: CoderSpec, tensor: str) -> bool:
    """Whether the layer that gives a tensor has all values, then all gates, instead of a channel's outputs in turn."""
    blocks = dict(spec.blocks())
    return tensor not in blocks and _inner_tensor(blocks, tensor)[1].gated


def _bypass_conv(stage: StageSpec) -> ConvSpec | None:
    return None if stage.bypass is None else stage.bypass.conv


def consumers(spec: CoderSpec, group: ChannelGroup) -> list[Consumer]:
    """All that reads the tensors of a group, in forward order.

    Where an identity carries a tensor on within its group, the consumers of the next tensor stand for it. A
    temporal upsampler gives the channels that it takes, so what comes behind it (`spatial`) reads them too.
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
    """What reads the tensor that enters a block."""
    for one in block.readers:
        yield Consumer(f"{address}.{one.layer}", one.norm and f"{address}.{one.norm}")
    if block.carries_input and leaves_group:
        yield Consumer(None, None)


def input_tensors(spec: CoderSpec) -> dict[str, str | None]:
    """Block address to the address of the block whose output it reads; None for what the first one reads."""
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
    """Kept channels after two steps: `second` indexes what `first` left. Both relative to their own input."""
    composed = dict(first)
    for tensor, kept in second.items():
        before = first.get(tensor)
        composed[tensor] = tuple(kept) if before is None else tuple(before[i] for i in kept)
    return composed
