"""Narrow to a decoder that a family's stock class can build: the original at another base width.

An identity shortcut carries a whole stream from block to block, so all tensors that identities join share one kept
set. Every width follows from the base width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count

from pydantic import ValidationError

from flashvaed_cli.decoders.modules.coder import Coder
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec
from flashvaed_cli.decoders.spec.groups import ChannelGroup, Kept, channel_groups, input_tensors, tensor_widths
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.registry import get_family, original_like
from flashvaed_cli.families.uniform_layout import fits_uniform_layout
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.numerics.independence import r2_of_set
from flashvaed_cli.numerics.selection import SELECTION_RULES, ChannelEvidence, unvarying_channels
from flashvaed_cli.surgery.evidence import channel_evidence
from flashvaed_cli.surgery.selection import GroupSelection


def native_base_width(spec: DecoderSpec) -> int:
    """The base width at which a decoder is its family's original.

    Raises:
        SpecError: the family has no native layout, or the decoder no longer has it.
    """
    obstacle = get_family(spec.family).native_obstacle
    if obstacle is not None:
        raise SpecError(f"--layout native: {spec.family} cannot be native: {obstacle}. Leave --layout out")
    base_width = fits_uniform_layout(spec, original_like(spec)).base_width
    if base_width is None:
        raise SpecError(
            "--layout native: this decoder is not its original at another base width, so no stock class can build "
            "it or anything pruned from it. Give the original, or leave --layout out"
        )
    return base_width


def native_spec(spec: DecoderSpec, base_width: int) -> DecoderSpec:
    """The family's original at a base width, configured like `spec`."""
    return original_like(spec)(base_width, spec.latent_width)


def base_width_step(spec: DecoderSpec, round_to: int) -> int:
    """The number that native base widths are multiples of.

    `round_to`, the fixed number of groups per GroupNorm, and the narrowest original that can be built at all: where
    channels move into time and space together with a residual, as in LTX-Video from 0.9.1 on, they come in whole cells.
    """
    groups = [norm.groups for _, block in spec.blocks() for norm, _ in block.norms.values() if norm.groups is not None]
    narrowest = next(width for width in count(1) if _can_be_built(spec, width))
    return math.lcm(round_to, narrowest, *groups)


def _can_be_built(spec: DecoderSpec, base_width: int) -> bool:
    try:
        native_spec(spec, base_width)
    except ValidationError:
        return False
    return True


def nearest_base_width(base_width: int, keep_ratio: float, round_to: int) -> int:
    """The multiple of `round_to` nearest to `base_width * keep_ratio`; at least `round_to`, at most `base_width`."""
    return min(max(round(base_width * keep_ratio / round_to), 1) * round_to, base_width)


def largest_base_width_within(
    spec: DecoderSpec, base_width: int, round_to: int, limit: float, cost: Callable[[DecoderSpec], float]
) -> int:
    """The largest base width whose decoder costs at most `limit`. Raises SpecError if none is cheap enough."""
    widths = range(round_to, base_width + 1, round_to)
    fitting = [width for width in widths if cost(native_spec(spec, width)) <= limit]
    if not fitting:
        least = cost(native_spec(spec, min(round_to, base_width)))
        raise SpecError(f"the narrowest native decoder takes {least:.4g} GFLOP, more than the {limit:g} asked for")
    return fitting[-1]


def linked_groups(spec: CoderSpec) -> list[ChannelGroup]:
    """The channel groups, those that an identity shortcut joins merged under the first one's name.

    A `run` is one group of a GroupNorm: a native student has as many, each narrower.
    """
    groups = channel_groups(spec)
    leader = {tensor: index for index, group in enumerate(groups) for tensor in group.tensors}
    sources = input_tensors(spec)
    for address, block in spec.blocks():
        source = sources[address]
        if block.keeps_channels and source is not None and source in leader and address in leader:
            old, new = leader[address], leader[source]
            leader = {tensor: new if index == old else index for tensor, index in leader.items()}
    joined: dict[int, list[str]] = {}
    for tensor, index in leader.items():
        joined.setdefault(index, []).append(tensor)
    runs = {i: math.lcm(*(group.run for group in groups if set(group.tensors) & set(t))) for i, t in joined.items()}
    return [
        ChannelGroup(groups[i].name, groups[i].stage, groups[i].width, tuple(t), runs[i]) for i, t in joined.items()
    ]


def select_native(
    decoder: Coder, statistics: Mapping[str, TensorStatistics], spec: CoderSpec, *, rule: str, seed: int = 0
) -> tuple[Kept, list[GroupSelection]]:
    """Choose the kept channels of every stream and inner tensor for the widths of `spec`.

    Args:
        statistics: by tensor address, of this very decoder.
        spec: of the same blocks, narrower.
    Returns:
        Kept channels by tensor address, ascending, and one line of report per set.
    Raises:
        CalibrationError: the statistics do not fit the decoder, or hold NaN.
    """
    widths = tensor_widths(spec)
    kept: Kept = {}
    report = []
    for index, group in enumerate(linked_groups(decoder.spec)):
        evidence = channel_evidence(decoder, group, statistics)
        num_kept = widths[group.tensors[0]]
        chosen = _chosen(rule, evidence, group, num_kept, seed + index)
        kept.update(dict.fromkeys(group.tensors, chosen))
        dead, constant = unvarying_channels(evidence)
        r2 = r2_of_set(evidence.covariance, chosen)
        report.append(GroupSelection(group.name, group.width, chosen, r2, tuple(dead), tuple(constant)))
    return kept, report


def _chosen(rule: str, evidence: ChannelEvidence, group: ChannelGroup, num_kept: int, seed: int) -> tuple[int, ...]:
    """The kept channels; where a GroupNorm reads them, equally many from each of its groups, so that none mix."""
    select, evidence = SELECTION_RULES[rule], replace(evidence, run=1)
    num_runs = group.width // group.run
    if group.run == 1 or num_kept % num_runs:
        return tuple(sorted(select(evidence, num_kept, seed=seed).kept))
    order = select(evidence, group.width, seed=seed).kept
    runs = [[channel for channel in order if channel // group.run == i] for i in range(num_runs)]
    return tuple(sorted(channel for run in runs for channel in run[: num_kept // num_runs]))
