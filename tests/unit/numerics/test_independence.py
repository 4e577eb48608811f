"""What a set explains, the map back and nuclear norms, against brute force on data matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.independence import effective_rank, nuclear_norm_drops, r2_of_set, reconstruction_map
from tests.unit.numerics.dependent_data import brute_force_r2, covariance_of, dependent_rows


@given(seed=st.integers(0, 10**6), width=st.integers(2, 9), rank=st.integers(1, 9), data=st.data())
@settings(max_examples=20, deadline=None)
def test_r2_and_map_of_any_set_equal_brute_force(seed: int, width: int, rank: int, data: st.DataObject) -> None:
    rows = dependent_rows(seed, width, rank, noise=data.draw(st.sampled_from([0.0, 0.1])))
    kept = data.draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=width, unique=True))
    covariance = covariance_of(rows)
    expected = brute_force_r2(rows, kept)
    assert r2_of_set(covariance, kept) == pytest.approx(expected, abs=1e-8)
    weight, bias = reconstruction_map(covariance, rows.mean(dim=0), kept)
    error = (rows[:, kept] @ weight.T + bias - rows).square().sum()
    total = (rows - rows.mean(dim=0)).square().sum()
    assert float(1.0 - error / total) == pytest.approx(expected, abs=1e-8)
    assert torch.equal(weight[kept], torch.eye(len(kept), dtype=torch.float64))
    assert torch.equal(bias[kept], torch.zeros(len(kept), dtype=torch.float64))


def test_dead_channels_help_no_other() -> None:
    rows = dependent_rows(0, 6, 2, noise=0.0)
    rows[:, 0] = 5.0
    weight, _ = reconstruction_map(covariance_of(rows), rows.mean(dim=0), [0, 2, 3])
    assert torch.equal(weight[[1, 2, 3, 4, 5], 0], torch.zeros(5, dtype=torch.float64))
    assert bool(torch.isfinite(weight).all())


def test_effective_rank() -> None:
    assert effective_rank(torch.diag(torch.tensor([90.0, 9.0, 0.9, 0.1], dtype=torch.float64)), 0.99) == 2
    assert effective_rank(torch.diag(torch.tensor([90.0, 9.0, 0.9, 0.1], dtype=torch.float64)), 0.995) == 3
    assert effective_rank(covariance_of(dependent_rows(0, 12, 3, noise=0.0)), 1.0) == 3
    assert effective_rank(torch.eye(7, dtype=torch.float64), 1.0) == 7
    assert effective_rank(torch.zeros(4, 4, dtype=torch.float64)) == 0


@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 8),
    rank=st.integers(1, 8),
    noise=st.sampled_from([0.0, 1e-3, 1.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
@settings(max_examples=30, deadline=None)
def test_nuclear_norm_drops_equal_singular_values(seed: int, width: int, rank: int, noise: float, scale: float) -> None:
    rows = scale * dependent_rows(seed, width, rank, noise)
    norm = float(torch.linalg.matrix_norm(rows, "nuc"))
    expected = []
    for channel in range(width):
        without = rows.clone()
        without[:, channel] = 0.0
        expected.append(norm - float(torch.linalg.matrix_norm(without, "nuc")))
    drops = nuclear_norm_drops(rows.T @ rows / len(rows)) * len(rows) ** 0.5
    # Roots of eigenvalues: 1e-16 of the largest becomes 1e-8 of its root.
    torch.testing.assert_close(drops, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7 * norm)


def test_nuclear_norm_drops_of_a_diagonal_are_its_roots() -> None:
    values = torch.tensor([4.0, 0.0, 9.0, 1e-10], dtype=torch.float64)
    torch.testing.assert_close(nuclear_norm_drops(torch.diag(values)), values.sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(nuclear_norm_drops(torch.zeros(3, 3, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("value", "message"), [(0.0, "no channel varies"), (float("nan"), "NaN")])
def test_bad_covariances_are_refused(value: float, message: str) -> None:
    covariance = torch.full((3, 3), value, dtype=torch.float64)
    with pytest.raises(CalibrationError, match=message):
        r2_of_set(covariance, [0])
    with pytest.raises(CalibrationError, match=message):
        reconstruction_map(covariance, torch.zeros(3, dtype=torch.float64), [0])
