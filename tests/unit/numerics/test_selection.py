"""Every selection rule against brute force on data matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.independence import r2_of_set
from flashvaed_cli.numerics.selection import (
    SELECTION_RULES,
    ChannelEvidence,
    select_chip,
    select_greedy_r2,
    select_l1,
    select_next_layer,
    select_pivoted_qr,
    select_random,
    select_variance,
    unvarying_channels,
)
from flashvaed_cli.recipe.fields import SelectionRule
from tests.unit.numerics.dependent_data import brute_force_r2, covariance_of, dependent_rows


def full_evidence(rows: Tensor, seed: int = 0) -> ChannelEvidence:
    """Evidence of everything a rule may want: statistics of the rows, weights at random."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(5, rows.shape[1], generator=generator, dtype=torch.float64)
    l1 = torch.rand(rows.shape[1], generator=generator, dtype=torch.float64)
    return ChannelEvidence(covariance_of(rows), rows.T @ rows / len(rows), l1, kernel.T @ kernel)


def equal_evidence(width: int) -> ChannelEvidence:
    """No channel differs from another."""
    eye = torch.eye(width, dtype=torch.float64)
    return ChannelEvidence(eye, eye, torch.ones(width, dtype=torch.float64), eye)


def brute_force_greedy(width: int, num_kept: int, score: Callable[[list[int]], float]) -> list[int]:
    """Forward selection of the set with the highest score."""
    kept: list[int] = []
    for _ in range(num_kept):
        scores = {j: score([*kept, j]) for j in range(width) if j not in kept}
        kept.append(max(scores, key=lambda j: scores[j]))
    return kept


def test_recipes_know_all_rules() -> None:
    assert get_args(SelectionRule) == tuple(SELECTION_RULES)


@given(seed=st.integers(0, 10**6), width=st.integers(2, 7), rank=st.integers(1, 7))
@settings(max_examples=12, deadline=None)
def test_greedy_equals_brute_force(seed: int, width: int, rank: int) -> None:
    rows = dependent_rows(seed, width, rank)
    selection = select_greedy_r2(ChannelEvidence(covariance_of(rows)), width)
    assert selection.kept[:-1] == brute_force_greedy(width, width - 1, lambda kept: brute_force_r2(rows, kept))
    assert sorted(selection.kept) == list(range(width))
    expected = [brute_force_r2(rows, selection.kept[: count + 1]) for count in range(width)]
    # Rounding of float64 sums over 200 rows.
    torch.testing.assert_close(selection.r2, expected, rtol=0, atol=1e-9)


@given(seed=st.integers(0, 10**6), width=st.integers(2, 6), num_outputs=st.integers(1, 8), taps=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_next_layer_equals_brute_force_over_what_the_consumer_computes(
    seed: int, width: int, num_outputs: int, taps: int
) -> None:
    rows = dependent_rows(seed, width, width)
    centred = rows - rows.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(num_outputs, width, taps, generator=generator, dtype=torch.float64)
    # Taps that do not correlate at all: at each position only one of them is not zero.
    windows = torch.stack([torch.block_diag(*[centred[:, [c]] for _ in range(taps)]) for c in range(width)], dim=1)
    outputs = torch.einsum("nct,oct->no", windows, kernel)  # [N * taps, O]

    def error(kept: list[int]) -> float:
        features = windows[:, kept].flatten(1)
        fitted = features @ torch.linalg.lstsq(features, outputs, driver="gelsd").solution
        return float((outputs - fitted).square().sum())

    metric = torch.einsum("oct,odt->cd", kernel, kernel)
    selection = select_next_layer(ChannelEvidence(covariance_of(rows), consumer_metric=metric), width)
    # Where few outputs are all explained, the rest of the order is a matter of rounding.
    total = float(outputs.square().sum())
    expected = brute_force_greedy(width, width - 1, lambda kept: -error(kept))
    decisive = sum(error(expected[:count]) > 1e-6 * total for count in range(1, width))
    assert selection.kept[:decisive] == expected[:decisive]


def test_next_layer_with_all_channels_alike_to_it_is_greedy_r2() -> None:
    covariance = covariance_of(dependent_rows(5, 12, 6))
    evidence = ChannelEvidence(covariance, consumer_metric=3.0 * torch.eye(12, dtype=torch.float64))
    assert select_next_layer(evidence, 11) == select_greedy_r2(evidence, 11)


def test_next_layer_takes_what_the_consumer_reads() -> None:
    evidence = ChannelEvidence(
        torch.diag(torch.tensor([9.0, 4.0, 1.0, 4.0], dtype=torch.float64)),
        consumer_metric=torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=torch.float64)),
    )
    assert select_next_layer(evidence, 4).kept == [3, 2, 0, 1]
    with pytest.raises(CalibrationError, match="no layer that reads these channels depends on them"):
        select_next_layer(ChannelEvidence(evidence.covariance, consumer_metric=torch.zeros(4, 4).double()), 2)


@given(seed=st.integers(0, 10**6), width=st.integers(2, 8), rank=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_pivoted_qr_takes_the_largest_residual_norms(seed: int, width: int, rank: int) -> None:
    rows = dependent_rows(seed, width, rank)
    residual = rows - rows.mean(dim=0)
    expected: list[int] = []
    for _ in range(width):
        norms = residual.norm(dim=0)
        norms[expected] = -1.0
        expected.append(int(norms.argmax()))
        direction = residual[:, expected[-1]] / residual[:, expected[-1]].norm()
        residual = residual - torch.outer(direction, direction @ residual)
    assert select_pivoted_qr(ChannelEvidence(covariance_of(rows)), width).kept == expected


@given(seed=st.integers(0, 10**6), width=st.integers(2, 8), rank=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_chip_ranks_by_the_drop_of_the_nuclear_norm(seed: int, width: int, rank: int) -> None:
    rows = dependent_rows(seed, width, rank)
    norms = []
    for channel in range(width):
        without = rows.clone()
        without[:, channel] = 0.0
        norms.append(float(torch.linalg.matrix_norm(without, "nuc")))
    expected = sorted(range(width), key=lambda channel: norms[channel])
    assert select_chip(full_evidence(rows), width).kept == expected


def test_l1_ranks_by_weights() -> None:
    weight_sums = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    evidence = ChannelEvidence(torch.eye(3, dtype=torch.float64), producer_l1=weight_sums)
    assert select_l1(evidence, 3).kept == [1, 2, 0]


def test_variance_ignores_dependence_and_greedy_does_not() -> None:
    signal = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.stack([3 * signal[:, 0], 3 * signal[:, 0], signal[:, 1]], dim=1)
    evidence = ChannelEvidence(covariance_of(rows))
    assert select_variance(evidence, 2).kept == [0, 1]
    for select in (select_greedy_r2, select_pivoted_qr):
        chosen = select(evidence, 2)
        assert chosen.kept == [0, 2]
        assert chosen.r2[-1] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_every_rule_reports_the_r2_of_its_set(rule: str) -> None:
    evidence = full_evidence(dependent_rows(3, 8, 4))
    selection = SELECTION_RULES[rule](evidence, 5, seed=7)
    assert len(set(selection.kept)) == len(selection.r2) == 5
    assert selection.r2 == sorted(selection.r2)
    assert selection.r2[-1] == pytest.approx(r2_of_set(evidence.covariance, selection.kept), abs=1e-12)
    assert selection == SELECTION_RULES[rule](evidence, 5, seed=7)


@pytest.mark.parametrize("rule", SELECTION_RULES)
@given(seed=st.integers(0, 10**6), width=st.integers(2, 12), rank=st.integers(1, 12), data=st.data())
@settings(max_examples=8, deadline=None)
def test_sets_are_nested(rule: str, seed: int, width: int, rank: int, data: st.DataObject) -> None:
    evidence = full_evidence(dependent_rows(seed, width, rank), seed)
    whole = SELECTION_RULES[rule](evidence, width, seed=seed)
    assert sorted(whole.kept) == list(range(width))
    count = data.draw(st.integers(1, width))
    part = SELECTION_RULES[rule](evidence, count, seed=seed)
    assert (part.kept, part.r2) == (whole.kept[:count], whole.r2[:count])


def test_random_follows_its_seed() -> None:
    evidence = full_evidence(dependent_rows(3, 8, 4))
    assert len({tuple(select_random(evidence, 4, seed=seed).kept) for seed in range(5)}) > 1


@pytest.mark.parametrize("rule", [rule for rule in SELECTION_RULES if rule != "random"])
def test_ties_go_to_the_lowest_index(rule: str) -> None:
    assert SELECTION_RULES[rule](equal_evidence(5), 5).kept == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rule", [rule for rule in SELECTION_RULES if rule != "greedy-energy"])
def test_channels_that_do_not_vary_come_last(rule: str) -> None:
    rows = dependent_rows(0, 7, 2, noise=0.0)  # rank 2: the others are dependent
    rows[:, 0] = 500.0
    rows[:, 1] = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-9
    rows[:, 4] = 0.0
    evidence = full_evidence(rows)
    assert SELECTION_RULES[rule](evidence, 7, seed=3).kept[4:] == [0, 1, 4]
    assert unvarying_channels(evidence) == ([1, 4], [0])


def test_greedy_energy_keeps_a_large_constant_channel_first_and_a_dead_one_last() -> None:
    rows = dependent_rows(0, 7, 2, noise=0.0)
    rows[:, 3] = 500.0
    rows[:, 4] = 0.0
    selection = SELECTION_RULES["greedy-energy"](full_evidence(rows), 7)
    assert selection.kept[0] == 3 and selection.kept[-1] == 4
    assert selection.r2[0] == 0.0 and selection.r2[-1] == pytest.approx(1.0)  # R2 is about the mean all the same


def test_greedy_energy_equals_brute_force() -> None:
    """The smallest squared error of least squares without a constant, one pick after another."""
    rows = dependent_rows(4, 7, 4) + torch.linspace(-2, 2, 7, dtype=torch.float64)
    kept: list[int] = []
    for _ in range(5):
        errors = {}
        for channel in set(range(7)) - set(kept):
            read = rows[:, [*kept, channel]]
            errors[channel] = float((rows - read @ torch.linalg.lstsq(read, rows).solution).square().sum())
        kept.append(min(errors, key=lambda channel: errors[channel]))
    assert SELECTION_RULES["greedy-energy"](full_evidence(rows), 5).kept == kept


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_bad_input_is_refused(rule: str) -> None:
    select, evidence = SELECTION_RULES[rule], equal_evidence(3)
    for num_kept in (0, 4, -1):
        with pytest.raises(CalibrationError, match="of 3 channels"):
            select(evidence, num_kept)
    for value, message in ((0.0, "no channel varies"), (float("nan"), "NaN")):
        bad = ChannelEvidence(torch.full((3, 3), value).double(), evidence.second_moment, evidence.producer_l1)
        with pytest.raises(CalibrationError, match="needs" if rule == "next-layer" else message):
            select(bad, 2)


@pytest.mark.parametrize(
    ("rule", "field", "what"),
    [
        ("l1", "producer_l1", "weights of the layers that produce"),
        ("next-layer", "consumer_metric", "weights of the layers that read"),
        ("chip", "second_moment", "means of the channels"),
    ],
)
def test_missing_or_broken_evidence_is_named(rule: str, field: str, what: str) -> None:
    evidence = equal_evidence(3)
    with pytest.raises(CalibrationError, match=f"{rule} needs the {what}.* not given"):
        SELECTION_RULES[rule](ChannelEvidence(evidence.covariance), 2)
    nan = torch.full_like(getattr(evidence, field), float("nan"))
    with pytest.raises(CalibrationError, match=f"{rule} needs the {what}.* NaN"):
        SELECTION_RULES[rule](ChannelEvidence(evidence.covariance, **{field: nan}), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_runs_are_picked_whole_and_by_the_sum_of_their_scores(rule: str) -> None:
    evidence = replace(full_evidence(dependent_rows(0, 12, 12)), run=3)
    order = SELECTION_RULES[rule](evidence, 12).kept
    assert sorted(order) == list(range(12))
    assert all(order[i : i + 3] == list(range(order[i], order[i] + 3)) for i in range(0, 12, 3))
    assert SELECTION_RULES[rule](evidence, 6).kept == order[:6]
    if rule == "variance":
        sums = evidence.covariance.diagonal().unflatten(0, (-1, 3)).sum(1)
        assert [first // 3 for first in order[::3]] == sums.argsort(descending=True).tolist()
