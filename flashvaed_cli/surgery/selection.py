"""Which channels of each group stay: a rule from `numerics.selection`, applied to the groups of some stages.

Reference: arXiv 2602.19161, section 3.1. Departure: the tensors of a group are weighted equally by scaling
each covariance to trace one, and one set is chosen for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from flashvaed_cli.decoders.groups import ChannelGroup, Kept, channel_groups
from flashvaed_cli.decoders.spec import CoderSpec
from flashvaed_cli.errors import CalibrationError, SpecError
from flashvaed_cli.numerics.selection import SELECTION_RULES, r2_of_set


@dataclass(frozen=True)
class GroupSelection:
    """What was chosen for one group; `r2` is that of the kept set on the group's pooled covariance."""

    group: str
    width: int
    kept: tuple[int, ...]
    r2: float


def group_covariance(
    group: ChannelGroup, covariances: Mapping[str, Float64[Tensor, "_C _C"]]
) -> Float64[Tensor, "C C"]:
    """Sum of the tensors' covariances, each scaled to trace one.

    Raises:
        CalibrationError: a tensor has no covariance of the group's width, or does not vary.
    """
    pooled = None
    for tensor in group.tensors:
        covariance = covariances.get(tensor)
        if covariance is None or covariance.shape[0] != group.width:
            found = "none" if covariance is None else f"{covariance.shape[0]} channels"
            raise CalibrationError(
                f"{tensor}: the analysis holds {found}, the decoder has {group.width} channels; "
                "run `flashvaed analyze` on this very decoder"
            )
        trace = float(covariance.trace())
        if not trace > 0:
            raise CalibrationError(f"{tensor}: no channel varies over the calibration clips; use other clips")
        pooled = covariance / trace if pooled is None else pooled + covariance / trace
    assert pooled is not None
    return pooled


def num_kept_channels(width: int, keep_ratio: float, round_to: int) -> int:
    """Width after pruning: nearest to `width * keep_ratio`, a multiple of `round_to`, 1 to `width`.

    Raises:
        SpecError: the ratio is not in (0, 1], or leaves no channel.
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise SpecError(f"the ratio is the fraction of channels kept, above 0 and at most 1; got {keep_ratio}")
    if round(width * keep_ratio) < 1:
        raise SpecError(f"ratio {keep_ratio} keeps none of {width} channels; use at least {1 / width:.3g}")
    multiple = max(round(width * keep_ratio / round_to), 1) * round_to
    return min(multiple, width)


def select_channels(
    spec: CoderSpec,
    covariances: Mapping[str, Float64[Tensor, "_C _C"]],
    keep_ratios: Mapping[str, float],
    *,
    rule: str,
    round_to: int = 1,
    seed: int = 0,
) -> tuple[Kept, list[GroupSelection]]:
    """Choose the kept channels of every group of the stages named in `keep_ratios`.

    A stage's entry (behind a resampler that changes the width) belongs to it.

    Returns:
        Kept channels by tensor address, ascending, and one line of report per group.
    Raises:
        SpecError: a stage has no channel group, or its ratio keeps no channel.
        CalibrationError: the covariances do not fit the spec, or hold NaN.
    """
    groups = channel_groups(spec)
    known = sorted({group.stage for group in groups})
    for stage in keep_ratios:
        if stage not in known:
            raise SpecError(f"no stage '{stage}' to prune; this decoder has {', '.join(known)}")
    kept: Kept = {}
    report = []
    for index, group in enumerate(groups):
        ratio = keep_ratios.get(group.stage)
        if ratio is None:
            continue
        num_kept = num_kept_channels(group.width, ratio, round_to)
        if num_kept == group.width:
            continue
        covariance = group_covariance(group, covariances)
        chosen = tuple(sorted(SELECTION_RULES[rule](covariance, num_kept, seed=seed + index).kept))
        kept.update(dict.fromkeys(group.tensors, chosen))
        report.append(GroupSelection(group.name, group.width, chosen, r2_of_set(covariance, chosen)))
    return kept, report
