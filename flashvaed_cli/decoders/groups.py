"""Channel groups: which tensors of a decoder carry the same channels.

A *tensor* is named by the address of the module that puts it out: a block (`up2.0`, the residual stream
behind it) or a layer (`up2.0.conv1`, the inside of a residual block). A group is chosen jointly: one kept
set for all its tensors. Derived from the spec alone, so every family has them.

Reference: arXiv 2602.19161, section 3.1; the residual stream of a stage is one group.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashvaed_cli.decoders.spec import BlockSpec, CoderSpec, ResBlockSpec, block_out_width

Kept = dict[str, tuple[int, ...]]
"""Tensor address to the channels that are left, as indices of the reference's channels; absent: all."""


@dataclass(frozen=True)
class ChannelGroup:
    """Tensors of one stage that share their channels. `name` is `up2.stream`, `up2.entry` or `up2.0.inner`."""

    name: str
    stage: str
    width: int
    tensors: tuple[str, ...]


def channel_groups(spec: CoderSpec) -> list[ChannelGroup]:
    """All groups in forward order. The latent, its 1x1 and the pixels belong to none."""
    found: dict[str, ChannelGroup] = {}

    def add(name: str, stage: str, width: int, tensor: str) -> None:
        known = found.get(name)
        tensors = (tensor,) if known is None else (*known.tensors, tensor)
        found[name] = ChannelGroup(name, stage, width, tensors)

    blocks = list(spec.blocks())
    for i, (address, block) in enumerate(blocks):
        stage = address.split(".")[0]
        if isinstance(block, ResBlockSpec):
            add(f"{address}.inner", stage, block.conv1.out_width, f"{address}.conv1")
        if i + 1 < len(blocks):
            owner = _stream_owner(stage, block, *blocks[i + 1])
            if owner is not None:
                add(owner, owner.split(".")[0], block_out_width(block), address)
    return list(found.values())


def _stream_owner(stage: str, block: BlockSpec, next_address: str, following: BlockSpec) -> str | None:
    """The group of the tensor between two blocks; None where it cannot be pruned."""
    if following.kind == "conv":
        return None  # the latent's own channels
    next_stage = next_address.split(".")[0]
    if block.kind not in ("conv", "upsample", "downsample") or next_stage == stage:
        return f"{stage}.stream"
    changes_width = isinstance(following, ResBlockSpec) and following.shortcut is not None
    return f"{next_stage}.entry" if changes_width else f"{next_stage}.stream"


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
