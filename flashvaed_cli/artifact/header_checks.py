"""Consistency checks on an artifact's header; each fault is named by its field. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from flashvaed_cli.decoders.spec.blocks import BlockSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.groups import tensor_widths
from flashvaed_cli.decoders.spec.latent_patches import are_per_place
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.limits import MAX_STATISTIC, MAX_WIDTH

_COLOURS = 3


def check_family(family: str, coders: Iterable[CoderSpec]) -> None:
    """Raise ValueError unless the family is known and matches that of the coders."""
    if family not in FAMILIES:
        raise ValueError(f"family {family!r:.60} is unknown; this version knows {', '.join(FAMILIES)}")
    for spec in coders:
        if spec.family != family:
            raise ValueError(f"{spec.role}.family is {spec.family!r:.60}, where family is {family!r}")


def check_groups(spec: CoderSpec) -> None:
    """Raise ValueError unless the groups of every GroupNorm divide its channels."""
    for address, block in spec.blocks():
        if block.group_fault is not None:
            raise ValueError(f"{spec.role} {address}: {block.group_fault}")


def check_statistics(mean: tuple[float, ...], std: tuple[float, ...], coders: Iterable[CoderSpec]) -> None:
    """Raise ValueError unless there is one mean and one positive deviation per latent channel (or per
    channel of 2x2 patches), or none at all."""
    if std and min(std) <= 0:
        raise ValueError(f"latent_std holds {min(std)}; deviations are positive")
    for name, values in (("latent_mean", mean), ("latent_std", std), ("1 / latent_std", [1 / value for value in std])):
        if values and not max(map(abs, values)) <= MAX_STATISTIC:
            raise ValueError(f"{name} holds {max(values, key=abs):g}; no latents are scaled by more than 1e6")
    if len(mean) != len(std):
        raise ValueError(f"latent_mean has {len(mean)} figures and latent_std {len(std)}")
    for spec in coders:
        assert isinstance(spec, DecoderSpec | EncoderSpec)
        if mean and len(mean) != spec.latent_width and not are_per_place(len(mean), spec.latent_width):
            raise ValueError(f"latent_mean has {len(mean)} figures; the {spec.role} has {spec.latent_width} latents")


def check_factors(spec: CoderSpec) -> None:
    """Raise ValueError unless the blocks change the grid by the factors that the spec states, and give pixels."""
    found = _scaling(spec.role, [block for _, block in spec.blocks()])
    stated = (spec.temporal_factor, spec.spatial_factor / spec.patch, spec.spatial_factor / spec.patch)
    if tuple(found[1:]) != stated[1:] or (found[0] != stated[0] and not spec.still):
        raise ValueError(
            f"{spec.role}: temporal_factor {spec.temporal_factor}, spatial_factor {spec.spatial_factor} and patch "
            f"{spec.patch} do not fit its blocks, which scale by {found[0]} x {found[1]} x {found[2]}"
        )
    for stage in spec.stages:
        if stage.bypass is None:
            continue
        inside = _scaling(spec.role, stage.blocks)
        bypass = [stage.bypass.temporal_factor, stage.bypass.spatial_factor, stage.bypass.spatial_factor]
        if inside[1:] != bypass[1:] or (inside[0] != bypass[0] and not spec.still):
            raise ValueError(f"{spec.role}: the bypass of {stage.name} scales by {bypass}, its blocks by {inside}")
    if isinstance(spec, DecoderSpec):
        width, pixels = spec.stages[-1].blocks[-1].out_width, _COLOURS * spec.patch**2
    else:
        colours = _COLOURS + int(isinstance(spec, EncoderSpec) and spec.opaque)
        width, pixels = spec.stages[0].blocks[0].in_width, colours * spec.patch**2
    if width != pixels:
        raise ValueError(f"{spec.role}: {width} channels of pixels, where patches of {spec.patch} have {pixels}")


def _scaling(role: str, blocks: Sequence[BlockSpec]) -> list[int]:
    """How a sequence of blocks scales frames, rows and columns."""
    factors = [block.growth if role == "decoder" else block.shrinkage for block in blocks]
    return [prod(factor[axis] for factor in factors) for axis in range(3)]


def check_kept_channels(kept: Mapping[str, tuple[int, ...]], decoder: DecoderSpec | None) -> None:
    """Raise ValueError unless each address is one of the decoder's, with one index per channel that it has."""
    if not kept:
        return
    if decoder is None:
        raise ValueError("kept_channels without a decoder")
    widths = tensor_widths(decoder)
    for address, indices in kept.items():
        if address not in widths:
            raise ValueError(f"kept_channels: {address!r:.60} is no tensor of the decoder")
        if len(indices) != widths[address]:
            raise ValueError(f"kept_channels: {len(indices)} for {address}, which has {widths[address]} channels")
        if len(set(indices)) != len(indices) or min(indices) < 0 or max(indices) >= MAX_WIDTH:
            raise ValueError(f"kept_channels: {address} holds indices that repeat or are out of range")
