"""Choose the kept channels of every group that has a ratio, by a rule from `numerics.selection`.

Channels that do not vary over the calibration clips are kept last and named in the report; only `greedy-energy` keeps
constant ones that are large, since they steady the norms. Where a GroupNorm reads the channels, its groups stay or go
whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.groups import ChannelGroup, Kept, channel_groups
from flashvaed_cli.errors import SpecError
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.numerics.independence import r2_of_set
from flashvaed_cli.numerics.selection import SELECTION_RULES, unvarying_channels
from flashvaed_cli.surgery.evidence import channel_evidence


@dataclass(frozen=True)
class GroupSelection:
    """The choice for one group.

    `r2` is that of the kept set on the group's pooled covariance; `dead` channels have neither variance nor mean,
    `constant` ones only a mean.
    """

    group: str
    width: int
    kept: tuple[int, ...]
    r2: float
    dead: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()


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
    decoder: Decoder,
    statistics: Mapping[str, TensorStatistics],
    keep_ratios: Mapping[str, float],
    *,
    rule: str,
    round_to: int = 1,
    seed: int = 0,
    prepared: Kept | None = None,
) -> tuple[Kept, list[GroupSelection]]:
    """Choose the kept channels of every group that has a ratio.

    Args:
        statistics: by tensor address, of this very decoder.
        keep_ratios: fraction kept by the name of a stage (`up3`, all its groups) or of a group (`up3.stream`), which
            wins over its stage. A stage's entry (after a resampler that changes the width) belongs to it.
        rule: a key of `SELECTION_RULES`.
        prepared: the sets that phase 2 of the distillation prepared to be kept; they win over the rule where they
            have the size that the ratio asks for.
    Returns:
        Kept channels by tensor address, ascending, and one line of report per group.
    Raises:
        SpecError: a name is no stage that has groups and no group, or a ratio keeps no channel.
        CalibrationError: the statistics do not fit the decoder, or hold NaN.
    """
    groups = channel_groups(decoder.spec)
    _require_known(keep_ratios, groups)
    kept: Kept = {}
    report = []
    for index, group in enumerate(groups):
        ratio = keep_ratios.get(group.name, keep_ratios.get(group.stage))
        if ratio is None:
            continue
        num_kept = num_kept_channels(group.width, ratio, math.lcm(round_to, group.run))
        if num_kept == group.width:
            continue
        evidence = channel_evidence(decoder, group, statistics)
        chosen = (prepared or {}).get(group.tensors[0], ())
        if len(chosen) != num_kept:
            chosen = tuple(sorted(SELECTION_RULES[rule](evidence, num_kept, seed=seed + index).kept))
        kept.update(dict.fromkeys(group.tensors, chosen))
        dead, constant = unvarying_channels(evidence)
        r2 = r2_of_set(evidence.covariance, chosen)
        report.append(GroupSelection(group.name, group.width, chosen, r2, tuple(dead), tuple(constant)))
    return kept, report


def _require_known(names: Mapping[str, float], groups: Sequence[ChannelGroup]) -> None:
    stages, group_names = sorted({group.stage for group in groups}), [group.name for group in groups]
    for name in names:
        kind, known = ("channel group", group_names) if "." in name else ("stage", stages)
        if name not in known:
            raise SpecError(f"no {kind} '{name}' to prune; this decoder has {', '.join(known)}")
