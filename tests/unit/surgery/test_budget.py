from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.predict.latency import rounded_ladder, width_ladder
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.wan21.spec import WAN21
from flashvaed_cli.surgery.budget import (
    GroupCurve,
    WidthPlan,
    gflop_cost,
    group_curves,
    plan_gflops,
    plan_speedup,
    search_widths,
)
from flashvaed_cli.surgery.selection import select_channels
from tests.toy import original_spec, toy_decoder
from tests.unit.surgery.random_statistics import random_statistics

GRID = (3, 2, 3)


def curve(name: str, width: int, decay: float, weight: float = 1.0) -> GroupCurve:
    """R² that comes nearer to one by the factor `decay` with every channel."""
    return GroupCurve(name, name.split(".")[0], tuple(1 - decay ** (k + 1) for k in range(width)), weight)


def linear(prices: Mapping[str, float], fixed: float = 1.0):
    return lambda widths: fixed + sum(prices[name] * width for name, width in widths.items())


def ladders_of(curves: list[GroupCurve], round_to: int = 1) -> dict[str, tuple[int, ...]]:
    return {one.group: rounded_ladder(width_ladder(one.width), round_to) for one in curves}


def total_error(curves: list[GroupCurve], widths: Mapping[str, int]) -> float:
    return sum(one.weight * one.error(widths[one.group]) for one in curves)


def test_the_group_that_costs_little_error_goes_first() -> None:
    curves = [curve("up2.stream", 16, 0.3), curve("up3.stream", 16, 0.9)]
    plan = plan_speedup(curves, linear({"up2.stream": 1, "up3.stream": 1}), ladders_of(curves), 1.3)
    assert plan.widths["up3.stream"] == 16 and plan.widths["up2.stream"] < 16
    assert plan.speedup >= 1.3
    assert plan.keep_ratios == {"up2.stream": plan.widths["up2.stream"] / 16}
    assert plan.errors["up3.stream"] == 0.0


def test_weights_count() -> None:
    curves = [curve("up2.stream", 16, 0.5, weight=4.0), curve("up3.stream", 16, 0.5)]
    plan = plan_speedup(curves, linear({"up2.stream": 1, "up3.stream": 1}), ladders_of(curves), 1.5)
    assert plan.widths["up3.stream"] < plan.widths["up2.stream"]


@pytest.mark.parametrize("target", [1.2, 1.6, 2.2, 3.0])
def test_close_to_the_best_of_all_combinations(target: float) -> None:
    curves = [curve("up2.stream", 16, 0.6, 3.0), curve("up2.0.inner", 16, 0.8), curve("up3.stream", 8, 0.7, 2.0)]
    ladders = ladders_of(curves)

    def cost(widths: Mapping[str, int]) -> float:
        return 20.0 + widths["up2.stream"] * widths["up2.0.inner"] + 10 * widths["up3.stream"]

    plan = plan_speedup(curves, cost, ladders, target)
    names = list(ladders)
    allowed = [
        total_error(curves, widths)
        for combination in itertools.product(*ladders.values())
        if cost(widths := dict(zip(names, combination, strict=True))) <= plan.full_cost / target
    ]
    # Greedy on a coarse ladder; one rung of one group is about that much.
    assert total_error(curves, plan.widths) <= 1.6 * min(allowed)


def test_the_last_move_stops_at_the_widest_that_is_enough() -> None:
    # Lossless down to two channels, so the best move leads to the bottom.
    curves = [GroupCurve("up3.stream", "up3", (0.5, *[1.0] * 15))]
    plan = plan_speedup(curves, linear({"up3.stream": 1}, fixed=0.0), ladders_of(curves), 1.9)
    assert plan.widths == {"up3.stream": 8}


def test_a_rung_that_is_slower_hides_nothing_behind_it() -> None:
    curves = [curve("up3.stream", 16, 0.5)]
    cost = {16: 10.0, 12: 12.0, 8: 11.0, 6: 5.0, 4: 5.0, 3: 5.0, 2: 5.0}
    plan = plan_speedup(curves, lambda widths: cost[widths["up3.stream"]], ladders_of(curves), 2.0)
    assert plan.widths == {"up3.stream": 6}


def test_groups_that_only_help_together_are_narrowed_together() -> None:
    curves = [curve("up3.stream", 16, 0.5, 3.0), curve("up3.0.inner", 16, 0.5), curve("up3.1.inner", 16, 0.5)]
    plan = plan_speedup(curves, lambda widths: 1.0 + max(widths.values()), ladders_of(curves), 1.8)
    assert set(plan.widths.values()) == {8}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.floats(0.1, 0.95), st.floats(0.1, 10)), min_size=1, max_size=4),
    st.integers(1, 8),
    st.data(),
)
def test_a_harder_target_never_gives_a_wider_group(
    groups: list[tuple[int, float, float]], round_to: int, data: st.DataObject
) -> None:
    curves = [curve(f"up{i}.stream", width, decay) for i, (width, decay, _) in enumerate(groups)]
    cost = linear({f"up{i}.stream": price for i, (_, _, price) in enumerate(groups)})
    ladders = ladders_of(curves, round_to)
    full = cost({one.group: one.width for one in curves})
    targets = sorted(data.draw(st.lists(st.floats(0.0, full), min_size=2, max_size=4)), reverse=True)
    plans = [search_widths(curves, cost, ladders, target) for target in targets]
    for easier, harder in itertools.pairwise(plans):
        assert all(harder.widths[name] <= easier.widths[name] for name in easier.widths)
    for plan, target in zip(plans, targets, strict=True):
        assert plan.cost == pytest.approx(cost(plan.widths))
        bottom = {name: ladder[-1] for name, ladder in ladders.items()}
        assert plan.cost <= target or plan.widths == bottom
        for one in curves:
            width = plan.widths[one.group]
            assert width == one.width or (width % round_to == 0 and 1 <= width < one.width)


@pytest.mark.parametrize("target", [1.0, 0.5, math.nan])
def test_a_target_of_at_most_one_is_refused(target: float) -> None:
    curves = [curve("up3.stream", 16, 0.5)]
    with pytest.raises(SpecError, match="asks for nothing: give one above 1"):
        plan_speedup(curves, linear({"up3.stream": 1}), ladders_of(curves), target)


def test_a_target_out_of_reach_names_the_limit_that_is_reachable() -> None:
    curves = [curve("up2.stream", 32, 0.5), curve("up3.stream", 16, 0.5)]
    prices = {"up2.stream": 1, "up3.stream": 1}
    with pytest.raises(SpecError) as caught:
        plan_speedup(curves, linear(prices, fixed=6.0), ladders_of(curves), 6.0)
    message = str(caught.value)
    assert "speed-up of 6 is out of reach: pruning up2 and up3 down to 0.125 of their channels" in message
    assert "4.5 at most" in message and "flashvaed convert-ops" in message
    assert plan_speedup(curves, linear(prices, fixed=6.0), ladders_of(curves), 4.5).speedup == pytest.approx(4.5)


def test_a_gflop_target_is_met_by_the_narrowed_spec() -> None:
    spec = original_spec()
    curves = group_curves(toy_decoder(), random_statistics(spec), WAN21.shallow_stages, rule="greedy-r2")
    full = total_gflop(spec, GRID)
    plan = plan_gflops(curves, gflop_cost(spec, GRID), ladders_of(curves), 0.7 * full)
    assert plan.full_cost == pytest.approx(full)
    kept, selections = select_channels(toy_decoder(), random_statistics(spec), plan.keep_ratios, rule="greedy-r2")
    assert {one.group: len(one.kept) for one in selections} == {n: plan.widths[n] for n in plan.keep_ratios}
    assert plan.cost <= 0.7 * full
    # The error predicted from the curve is that of the channels that are then chosen.
    assert {one.group: 1 - one.r2 for one in selections} == pytest.approx(
        {name: plan.errors[name] for name in plan.keep_ratios}, abs=1e-9
    )
    assert kept


@pytest.mark.parametrize(
    ("share", "message"), [(1.0, "asks for nothing"), (0.01, r"out of reach: pruning up2 and up3 down to .* leaves")]
)
def test_gflop_targets_that_make_no_sense_are_refused(share: float, message: str) -> None:
    spec = original_spec()
    curves = group_curves(toy_decoder(), random_statistics(spec), WAN21.shallow_stages, rule="l1")
    with pytest.raises(SpecError, match=message):
        plan_gflops(curves, gflop_cost(spec, GRID), ladders_of(curves), share * total_gflop(spec, GRID))


@pytest.mark.parametrize("rule", ["greedy-r2", "random", "chip", "next-layer"])
def test_curves_are_those_of_the_rule(rule: str) -> None:
    decoder, statistics = toy_decoder(), random_statistics(original_spec())
    curves = {one.group: one for one in group_curves(decoder, statistics, ("up3",), rule=rule, seed=3)}
    groups = {group.name: group for group in channel_groups(decoder.spec) if group.stage == "up3"}
    assert list(curves) == list(groups)
    _, selections = select_channels(decoder, statistics, {"up3": 0.5}, rule=rule, seed=3)
    for one in selections:
        assert curves[one.group].error(2) == pytest.approx(1 - one.r2, abs=1e-9)
        assert curves[one.group].error(4) == 0.0
        assert curves[one.group].weight == len(groups[one.group].tensors)


def test_a_plan_knows_its_speedup() -> None:
    plan = WidthPlan({"a": 1, "b": 2}, {"a": 4, "b": 2}, 12.0, 3.0, {"a": 0.1, "b": 0.0})
    assert (plan.speedup, plan.keep_ratios) == (4.0, {"a": 0.25})
