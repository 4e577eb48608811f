"""Addresses inside a coder: a block is `up2.0` (stage and index), a layer `up2.0.conv1`. Imports no torch."""

from __future__ import annotations


def stage_of(address: str) -> str:
    """The stage of a block, a layer or a channel group."""
    return address.partition(".")[0]


def block_of(address: str) -> str:
    """The block of a layer, or the block itself."""
    return ".".join(address.split(".")[:2])


def split_block(address: str) -> tuple[str, int]:
    """Stage and index of a block."""
    stage, index = address.split(".")
    return stage, int(index)
