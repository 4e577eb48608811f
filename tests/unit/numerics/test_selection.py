"""Selection against brute-force least squares on data matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.selection import (
    SELECTION_RULES,
    effective_rank,
    r2_of_set,
    reconstruction_map,
    select_greedy_r2,
    select_random,
    select_variance,
)


def _data(seed: int, width: int, rank: int, noise: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(200, rank, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    noise_rows = torch.randn(200, width, generator=generator, dtype=torch.float64)
    return factors @ mixing + noise * noise_rows + torch.arange(width, dtype=torch.float64)


def _covariance(data: Tensor) -> Tensor:
    centred = data - data.mean(dim=0)
    return centred.T @ centred / len(data)


def _brute_force_r2(data: Tensor, kept: list[int]) -> float:
    centred = data - data.mean(dim=0)
    fitted = centred[:, kept] @ torch.linalg.lstsq(centred[:, kept], centred, driver="gelsd").solution
    return 1.0 - float((centred - fitted).square().sum() / centred.square().sum())


def _brute_force_greedy(data: Tensor, num_kept: int) -> list[int]:
    kept: list[int] = []
    for _ in range(num_kept):
        scores = {j: _brute_force_r2(data, [*kept, j]) for j in range(data.shape[1]) if j not in kept}
        kept.append(max(scores, key=lambda j: scores[j]))
    return kept


@given(seed=st.integers(0, 10**6), width=st.integers(2, 7), rank=st.integers(1, 7))
@settings(max_examples=12, deadline=None)
def test_greedy_equals_brute_force(seed: int, width: int, rank: int) -> None:
    data = _data(seed, width, rank)
    selection = select_greedy_r2(_covariance(data), width)
    assert selection.kept[:-1] == _brute_force_greedy(data, width - 1)
    assert sorted(selection.kept) == list(range(width))
    expected = [_brute_force_r2(data, selection.kept[: count + 1]) for count in range(width)]
    # Rounding of float64 sums over 200 rows.
    torch.testing.assert_close(selection.r2, expected, rtol=0, atol=1e-9)


@given(seed=st.integers(0, 10**6), width=st.integers(2, 9), rank=st.integers(1, 9), data=st.data())
@settings(max_examples=20, deadline=None)
def test_r2_and_map_of_any_set_equal_brute_force(seed: int, width: int, rank: int, data: st.DataObject) -> None:
    rows = _data(seed, width, rank, noise=data.draw(st.sampled_from([0.0, 0.1])))
    kept = data.draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=width, unique=True))
    covariance = _covariance(rows)
    expected = _brute_force_r2(rows, kept)
    assert r2_of_set(covariance, kept) == pytest.approx(expected, abs=1e-8)
    weight, bias = reconstruction_map(covariance, rows.mean(dim=0), kept)
    error = (rows[:, kept] @ weight.T + bias - rows).square().sum()
    total = (rows - rows.mean(dim=0)).square().sum()
    assert float(1.0 - error / total) == pytest.approx(expected, abs=1e-8)
    assert torch.equal(weight[kept], torch.eye(len(kept), dtype=torch.float64))
    assert torch.equal(bias[kept], torch.zeros(len(kept), dtype=torch.float64))


@pytest.mark.parametrize("rule", list(SELECTION_RULES))
def test_every_rule_reports_the_r2_of_its_set(rule: str) -> None:
    covariance = _covariance(_data(3, 8, 4))
    selection = SELECTION_RULES[rule](covariance, 5, seed=7)
    assert len(set(selection.kept)) == len(selection.r2) == 5
    assert selection.r2 == sorted(selection.r2)
    assert selection.r2[-1] == pytest.approx(r2_of_set(covariance, selection.kept), abs=1e-12)
    assert selection == SELECTION_RULES[rule](covariance, 5, seed=7)


def test_random_is_seeded_and_nested() -> None:
    covariance = _covariance(_data(3, 8, 4))
    assert select_random(covariance, 3, seed=1).kept == select_random(covariance, 6, seed=1).kept[:3]
    assert len({tuple(select_random(covariance, 4, seed=seed).kept) for seed in range(5)}) > 1


def test_variance_ignores_dependence_and_greedy_does_not() -> None:
    signal = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = torch.stack([3 * signal[:, 0], 3 * signal[:, 0], signal[:, 1]], dim=1)
    covariance = _covariance(data)
    assert select_variance(covariance, 2).kept == [0, 1]
    greedy = select_greedy_r2(covariance, 2)
    assert greedy.kept == [0, 2]
    assert greedy.r2[-1] == pytest.approx(1.0, abs=1e-12)


def test_ties_go_to_the_lowest_index() -> None:
    assert select_greedy_r2(torch.eye(5, dtype=torch.float64), 5).kept == [0, 1, 2, 3, 4]
    assert select_variance(torch.eye(5, dtype=torch.float64), 3).kept == [0, 1, 2]


def test_dead_channels_come_last() -> None:
    data = _data(0, 6, 2, noise=0.0)  # rank 2: four channels are dependent
    data[:, 0] = 5.0
    data[:, 1] = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-9
    selection = select_greedy_r2(_covariance(data), 6)
    assert set(selection.kept[4:]) == {0, 1}
    assert selection.kept[4:] == [0, 1]
    weight, _ = reconstruction_map(_covariance(data), data.mean(dim=0), [0, 2, 3])
    assert torch.equal(weight[[2, 3, 4, 5], 0], torch.zeros(4, dtype=torch.float64))
    assert bool(torch.isfinite(weight).all())


def test_effective_rank() -> None:
    assert effective_rank(torch.diag(torch.tensor([90.0, 9.0, 0.9, 0.1], dtype=torch.float64)), 0.99) == 2
    assert effective_rank(torch.diag(torch.tensor([90.0, 9.0, 0.9, 0.1], dtype=torch.float64)), 0.995) == 3
    assert effective_rank(_covariance(_data(0, 12, 3, noise=0.0)), 1.0) == 3
    assert effective_rank(torch.eye(7, dtype=torch.float64), 1.0) == 7
    assert effective_rank(torch.zeros(4, 4, dtype=torch.float64)) == 0


@pytest.mark.parametrize("rule", list(SELECTION_RULES))
def test_bad_input_is_refused(rule: str) -> None:
    select, covariance = SELECTION_RULES[rule], torch.eye(3, dtype=torch.float64)
    for num_kept in (0, 4, -1):
        with pytest.raises(CalibrationError, match="of 3 channels"):
            select(covariance, num_kept)
    with pytest.raises(CalibrationError, match="no channel varies"):
        select(torch.zeros(3, 3, dtype=torch.float64), 2)
    with pytest.raises(CalibrationError, match="NaN"):
        select(torch.full((3, 3), float("nan"), dtype=torch.float64), 2)
