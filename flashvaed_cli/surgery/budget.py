"""Budget search: the width of every channel group with which decoding meets a target at the least error.

A pure search over curves and a cost function; no decoder runs. Starting from the full widths, whatever saves the most
cost per added error is narrowed, one group or several together, until the target is met. One move may go down several
rungs of the ladders, so that a rung that saves nothing does not hide the ones below it.

The error of a group is 1 - R² of its kept channels, on the pooled statistics that its rule chose them by. It counts
once for every tensor of the group: what is lost of a stream is lost in each block of its stage, what is lost inside
a block in that block alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import Grid, stage_costs
from flashvaed_cli.decoders.predict.latency import LOWEST_RATIO, block_axes
from flashvaed_cli.decoders.spec.addresses import block_of
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.errors import SpecError
from flashvaed_cli.numerics.covariance import TensorStatistics
from flashvaed_cli.numerics.selection import SELECTION_RULES
from flashvaed_cli.surgery.evidence import channel_evidence
from flashvaed_cli.surgery.respec import spec_of_widths

Cost = Callable[[Mapping[str, int]], float]
"""Milliseconds or GFLOP of decoding, from the widths of all groups."""

Ladders = Mapping[str, Sequence[int]]
"""The widths that a group may have by its name, widest first; see `decoders.predict.latency`."""

_NEGLIGIBLE_ERROR = 1e-9
"""Added error that counts as this much: below it only the saving decides."""


@dataclass(frozen=True)
class GroupCurve:
    """The loss from narrowing a group: `r2[k - 1]` is R² of the first k kept channels; `weight` counts its tensors."""

    group: str
    stage: str
    r2: tuple[float, ...]
    weight: float = 1.0

    @property
    def width(self) -> int:
        """Channels of the group."""
        return len(self.r2)

    def error(self, width: int) -> float:
        """1 - R² at a width; nothing is lost at the full one."""
        return 0.0 if width == self.width else max(1.0 - self.r2[width - 1], 0.0)

    def added_error(self, width: int, narrower: int) -> float:
        """Error added by going from one width to a narrower one, over all tensors of the group."""
        return self.weight * (self.error(narrower) - self.error(width))


@dataclass(frozen=True)
class WidthPlan:
    """The widths found, the cost at full and at these widths, and the error of every group; by group name."""

    widths: dict[str, int]
    full_widths: dict[str, int]
    full_cost: float
    cost: float
    errors: dict[str, float]

    @property
    def speedup(self) -> float:
        """How many times cheaper than at full width."""
        return self.full_cost / self.cost

    @property
    def keep_ratios(self) -> dict[str, float]:
        """The fraction kept of every group that is narrowed, for `select_channels`."""
        return {name: w / self.full_widths[name] for name, w in self.widths.items() if w < self.full_widths[name]}


def group_curves(
    decoder: Decoder, statistics: Mapping[str, TensorStatistics], stages: Sequence[str], *, rule: str, seed: int = 0
) -> list[GroupCurve]:
    """The R² curves of the groups of some stages, in the order in which a rule picks their channels.

    Args:
        seed: the same as for `select_channels`.
    Raises:
        CalibrationError: the statistics do not fit the decoder.
    """
    curves = []
    for index, group in enumerate(channel_groups(decoder.spec)):
        if group.stage in stages:
            evidence = channel_evidence(decoder, group, statistics)
            order = SELECTION_RULES[rule](evidence, group.width, seed=seed + index)
            curves.append(GroupCurve(group.name, group.stage, tuple(order.r2), float(len(group.tensors))))
    return curves


def gflop_cost(spec: DecoderSpec, grid: Grid) -> Cost:
    """GFLOP of decoding latents of a grid, remembered block by block: the search asks thousands of times."""
    names = {
        address: tuple(name for axis in axes for name in axis)
        for address, axes in block_axes(spec, channel_groups(spec)).items()
    }
    known: dict[tuple[object, ...], float] = {}

    def cost(widths: Mapping[str, int]) -> float:
        keys = {address: (address, *map(widths.get, names.get(address, ()))) for address, _ in spec.blocks()}
        if not all(key in known for key in keys.values()):
            flop = dict.fromkeys(keys, 0)
            for stage in stage_costs(spec_of_widths(spec, widths), grid):
                for layer in stage.layers:
                    flop[block_of(layer.address)] += layer.flop
            known.update({keys[address]: value / 1e9 for address, value in flop.items()})
        return sum(known[key] for key in keys.values())

    return cost


def plan_speedup(curves: Sequence[GroupCurve], cost: Cost, ladders: Ladders, target_speedup: float) -> WidthPlan:
    """Widths with which decoding is predicted to be `target_speedup` times as fast as at full width.

    Raises:
        SpecError: the target is not above 1, or beyond what the groups can give.
    """
    if not target_speedup > 1:
        raise SpecError(f"a target speed-up of {target_speedup:g} asks for nothing: give one above 1")
    plan = search_widths(curves, cost, ladders, _full_cost(curves, cost) / target_speedup)
    if plan.speedup < target_speedup * (1 - 1e-9):
        raise SpecError(
            f"a speed-up of {target_speedup:g} is out of reach: pruning {_limit(curves, plan)} is predicted to give "
            f"{_floor(plan.speedup)}. Ask for less, or make the operators cheaper first with `flashvaed convert-ops` "
            "and prune its output"
        )
    return plan


def plan_gflops(curves: Sequence[GroupCurve], cost: Cost, ladders: Ladders, target_gflops: float) -> WidthPlan:
    """Widths with which decoding takes at most `target_gflops`.

    Raises:
        SpecError: the decoder takes no more as it is, or the groups cannot save so much.
    """
    full = _full_cost(curves, cost)
    if target_gflops >= full:
        raise SpecError(f"a target of {target_gflops:g} GFLOP asks for nothing: the decoder takes {full:.4g} as it is")
    plan = search_widths(curves, cost, ladders, target_gflops)
    if plan.cost > target_gflops * (1 + 1e-9):
        raise SpecError(
            f"{target_gflops:g} GFLOP are out of reach: pruning {_limit(curves, plan)} leaves {plan.cost:.4g} of "
            f"{full:.4g}. Ask for more, or make the operators cheaper first with `flashvaed convert-ops` and prune "
            "its output"
        )
    return plan


def search_widths(curves: Sequence[GroupCurve], cost: Cost, ladders: Ladders, max_cost: float) -> WidthPlan:
    """Narrow groups by the best saving per added error until the cost is at most `max_cost`, or nothing saves more.

    A smaller `max_cost` goes on from the same widths, so it never gives a wider group. The last move stops at the
    widest rung that meets the target.

    Args:
        curves: one per group, none twice.
        cost: of all groups' widths.
        ladders: the widths that each group may have.
    """
    by_name = {curve.group: curve for curve in curves}
    full_widths = {name: curve.width for name, curve in by_name.items()}
    widths = dict(full_widths)
    full = now = cost(widths)
    while now > max_cost:
        found = [move for names in _teams(curves) for move in _moves(names, widths, now, cost, ladders, by_name)]
        best = max(found, key=lambda move: (move.gain, move.saved), default=None)
        if best is None:
            break
        # A team's moves come widest first.
        stops = [move for move in found if move.team == best.team and move.rung <= best.rung]
        taken = next((move for move in stops if move.cost <= max_cost), best)
        widths, now = taken.widths, taken.cost
    errors = {name: by_name[name].error(width) for name, width in widths.items()}
    return WidthPlan(widths, full_widths, full, now, errors)


@dataclass(frozen=True)
class _Move:
    """A team taken down to one rung of its ladders."""

    team: tuple[str, ...]
    rung: int
    widths: dict[str, int]
    cost: float
    saved: float
    gain: float


def _teams(curves: Sequence[GroupCurve]) -> list[tuple[str, ...]]:
    """Groups to narrow together: each by itself, those inside the blocks of a stage, a whole stage, all.

    A layer may only become fast when both its sides are narrow, and then no group by itself saves anything.
    """
    teams: list[tuple[str, ...]] = [(curve.group,) for curve in curves]
    for stage in dict.fromkeys(curve.stage for curve in curves):
        names = tuple(curve.group for curve in curves if curve.stage == stage)
        teams += [tuple(name for name in names if name.endswith(".inner")), names]
    teams.append(tuple(curve.group for curve in curves))
    return list(dict.fromkeys(team for team in teams if team))


def _moves(
    team: tuple[str, ...],
    widths: Mapping[str, int],
    now: float,
    cost: Cost,
    ladders: Ladders,
    curves: Mapping[str, GroupCurve],
) -> Iterator[_Move]:
    """The moves of a team that save something, widest first."""
    for rung in range(1, max(len(ladders[name]) for name in team)):
        lower = {name: ladders[name][min(rung, len(ladders[name]) - 1)] for name in team}
        changed = {name: width for name, width in lower.items() if width < widths[name]}
        if not changed:
            continue
        after = {**widths, **changed}
        saved = now - (cost_after := cost(after))
        if saved <= 0:
            continue
        added = sum(curves[name].added_error(widths[name], width) for name, width in changed.items())
        yield _Move(team, rung, after, cost_after, saved, saved / max(added, _NEGLIGIBLE_ERROR))


def _full_cost(curves: Sequence[GroupCurve], cost: Cost) -> float:
    return cost({curve.group: curve.width for curve in curves})


def _limit(curves: Sequence[GroupCurve], plan: WidthPlan) -> str:
    """The limits of the search, for messages."""
    stages = " and ".join(dict.fromkeys(curve.stage for curve in curves))
    least = min(width / plan.full_widths[name] for name, width in plan.widths.items())
    return f"{stages} down to {max(least, LOWEST_RATIO):.3g} of their channels"


def _floor(speedup: float) -> str:
    """Rounded down: what the message promises must be reachable."""
    return f"{math.floor(100 * speedup) / 100:g} at most"
