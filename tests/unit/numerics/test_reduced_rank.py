"""Reduced-rank regression against brute force: no weight of that rank does better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvaed_cli.numerics.least_squares import NormalEquations, relative_error, solve_ridge
from flashvaed_cli.numerics.reduced_rank import factorise, solve_reduced_rank


def equations_of(seed: int, num_features: int, num_outputs: int) -> tuple[NormalEquations, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, num_features, generator=generator, dtype=torch.float64) + 2
    x = x @ torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(num_features, num_outputs, generator=generator, dtype=torch.float64)
    y = y + torch.randn(y.shape, generator=generator, dtype=torch.float64) - 3
    equations = NormalEquations(num_features, num_outputs)
    equations.update(x, y)
    return equations, x - x.mean(0), y - y.mean(0)


def objective(x, y, weight, prior, frac) -> torch.Tensor:
    """The ridge problem as it is defined, on the rows themselves."""
    damping = frac * x.square().sum(0)
    return (x @ weight.T - y).square().sum() + (damping * (weight - prior).square()).sum()


@given(seed=st.integers(0, 99), sizes=st.tuples(st.integers(2, 6), st.integers(2, 5)), frac=st.sampled_from([0.0, 0.3]))
@settings(max_examples=10)
def test_no_descent_finds_a_better_weight_of_that_rank(seed: int, sizes: tuple[int, int], frac: float) -> None:
    equations, x, y = equations_of(seed, *sizes)
    num_features, num_outputs = sizes
    generator = torch.Generator().manual_seed(seed + 1)
    prior = torch.randn(num_outputs, num_features, generator=generator, dtype=torch.float64)
    rank = min(sizes) - 1
    outer, inner, bias = solve_reduced_rank(equations, rank, dampening_frac=frac, prior_weight=prior)
    assert (outer.shape, inner.shape) == ((num_outputs, rank), (rank, num_features))
    found = objective(x, y, outer @ inner, prior, frac)
    for start in range(3):  # alternating least squares from anywhere: each half step is exact
        generator = torch.Generator().manual_seed(start)
        a = torch.randn(num_outputs, rank, generator=generator, dtype=torch.float64)
        rows = torch.cat([x, (frac * x.square().sum(0)).sqrt().diag()])
        goal = torch.cat([y, ((frac * x.square().sum(0)).sqrt() * prior).T])
        for _ in range(60):
            b = torch.linalg.lstsq(rows, goal @ torch.linalg.pinv(a).T).solution.T
            a = torch.linalg.lstsq(rows @ b.T, goal).solution.T
        assert found <= objective(x, y, a @ b, prior, frac) * (1 + 1e-9)
    torch.testing.assert_close(bias, equations.target_mean - outer @ inner @ equations.feature_mean)


def test_full_rank_is_the_ridge_solution_and_error_falls_with_the_rank() -> None:
    equations, _, _ = equations_of(7, 6, 4)
    full = solve_ridge(equations, dampening_frac=1e-3)
    solved = [solve_reduced_rank(equations, rank, dampening_frac=1e-3) for rank in range(1, 5)]
    errors = [relative_error(equations, outer @ inner, bias) for outer, inner, bias in solved]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(solved[-1][0] @ solved[-1][1], full.weight)


def test_without_a_gram_the_factors_are_those_of_the_singular_values() -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    outer, inner = factorise(weight, 2)
    torch.testing.assert_close(outer @ inner, u[:, :2] * s[:2] @ vh[:2])
    with pytest.raises(ValueError, match="no factors of rank 6"):
        factorise(weight, 6)
