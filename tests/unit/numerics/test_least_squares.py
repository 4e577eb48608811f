"""Normal equations and ridge against solutions from the stacked data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.least_squares import NormalEquations, relative_error, solve_ridge


def _problem(num_rows: int, num_features: int, num_outputs: int, *, offset: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    mixing = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    x = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64) @ mixing + offset
    weight = torch.randn(num_outputs, num_features, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, num_outputs, generator=generator, dtype=torch.float64)
    return x, x @ weight.T - 2 * offset + noise


def _equations(x: Tensor, y: Tensor, *, parts: int = 3) -> NormalEquations:
    equations = NormalEquations(x.shape[1], y.shape[1])
    for x_part, y_part in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        equations.update(x_part, y_part)
    return equations


def _stacked_ridge(x: Tensor, y: Tensor, ridge: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """The same minimum by plain least squares: a row √λ_k per feature below the data, an undamped column of ones."""
    features = x.shape[1]
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    root = ridge.sqrt()[:, None]
    damping = torch.eye(features, features + 1, dtype=x.dtype) * root
    right = torch.cat([y, prior.T * root])
    solution = torch.linalg.lstsq(torch.cat([rows, damping]), right, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


def _brute_force_error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    return float((x @ weight.T + bias - y).square().sum() / (y - y.mean(dim=0)).square().sum())


@given(
    num_rows=st.integers(4, 60),
    num_features=st.integers(1, 8),
    num_outputs=st.integers(1, 3),
    dampening_frac=st.sampled_from([1e-4, 1e-2, 1.0]),
    has_prior=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_ridge_equals_stacked_least_squares(
    num_rows: int, num_features: int, num_outputs: int, dampening_frac: float, has_prior: bool
) -> None:
    x, y = _problem(num_rows, num_features, num_outputs)
    equations = _equations(x, y)
    prior = torch.full((num_outputs, num_features), 0.7, dtype=torch.float64)
    solution = solve_ridge(equations, dampening_frac=dampening_frac, prior_weight=prior if has_prior else None)
    ridge = dampening_frac * (x - x.mean(dim=0)).square().sum(dim=0)
    weight, bias = _stacked_ridge(x, y, ridge, prior if has_prior else torch.zeros_like(prior))
    # Normal equations square the condition number; the damping bounds it by about 1e6.
    torch.testing.assert_close(solution.weight, weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solution.bias, bias, rtol=1e-6, atol=1e-5)
    assert solution.relative_error == pytest.approx(_brute_force_error(x, y, weight, bias), rel=1e-6, abs=1e-9)
    assert (solution.num_rows, solution.num_unknowns) == (num_rows, num_features + 1)


def test_recovers_a_known_map() -> None:
    x, _ = _problem(100, 6, 1)
    weight = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
    y = x @ weight.T + torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    solution = solve_ridge(_equations(x, y), dampening_frac=0.0)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-9, atol=1e-9)
    assert 0.0 <= solution.relative_error < 1e-12


def test_relative_error_of_any_weight_equals_brute_force() -> None:
    x, y = _problem(40, 5, 2)
    equations = _equations(x, y)
    weight, bias = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, -4.0])
    expected = _brute_force_error(x, y, weight.double(), bias.double())
    assert relative_error(equations, weight, bias) == pytest.approx(expected, rel=1e-10)


def test_constant_targets_have_a_documented_error() -> None:
    x, _ = _problem(40, 5, 2)
    equations = _equations(x, torch.full((40, 2), 0.1, dtype=torch.float64))
    assert solve_ridge(equations, dampening_frac=1e-3).relative_error == 0.0
    assert relative_error(equations, torch.zeros(2, 5), torch.ones(2)) == float("inf")


def test_neither_the_order_of_the_sums_nor_the_threads_show() -> None:
    """With float32 products a solve of dependent features moved by 2 % of its largest weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=generator) + 0.01 * torch.randn(4000, 24, generator=generator)
    y = x @ torch.randn(24, 3, generator=generator) + 0.1 * torch.randn(4000, 3, generator=generator)
    order = torch.randperm(4000, generator=generator)
    before = torch.get_num_threads()
    weights = []
    try:
        for num_threads, rows in ((1, slice(None)), (2, slice(None)), (1, order)):
            torch.set_num_threads(num_threads)
            weights.append(solve_ridge(_equations(x[rows], y[rows]), dampening_frac=1e-4).weight)
    finally:
        torch.set_num_threads(before)
    for other in weights[1:]:
        assert float((weights[0] - other).abs().max()) < 1e-8 * float(weights[0].abs().max())


def test_float32_rows_far_from_zero_lose_nothing_more() -> None:
    x, y = (values.float() for values in _problem(500, 6, 2, offset=300.0))
    near, far = (solve_ridge(_equations(a, b), dampening_frac=1e-3) for a, b in ((x, y), (x.double(), y.double())))
    torch.testing.assert_close(near.weight, far.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(near.bias, far.bias, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("split", [0, 1, 3, 4])
def test_merge_and_updates_after_a_solve_equal_one_pass(split: int) -> None:
    x, y = _problem(80, 5, 2)
    x[60:] += 10.0
    left, right = NormalEquations(5, 2), NormalEquations(5, 2)
    for index, (x_part, y_part) in enumerate(zip(x.split(20), y.split(20), strict=True)):
        side = left if index < split else right
        side.update(x_part, y_part)
        side.centre()  # as a solve between two updates does
    left.merge(right)
    merged, whole = solve_ridge(left, dampening_frac=1e-4), solve_ridge(_equations(x, y), dampening_frac=1e-4)
    assert left.num_rows == 80
    torch.testing.assert_close(merged.weight, whole.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged.bias, whole.bias, rtol=1e-8, atol=1e-8)
    assert merged.relative_error == pytest.approx(whole.relative_error, rel=1e-8)


def test_wider_than_a_panel_and_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _problem(50, 7, 2)
    expected = solve_ridge(_equations(x, y), dampening_frac=1e-4)
    monkeypatch.setattr("flashvaed_cli.numerics.accumulation._PANEL_WIDTH", 3)
    monkeypatch.setattr("flashvaed_cli.numerics.least_squares.rows_per_block", lambda _: 4)
    equations = _equations(x, y)
    torch.testing.assert_close(solve_ridge(equations, dampening_frac=1e-4).weight, expected.weight)
    assert torch.equal(equations.gram, equations.gram.T)


def test_the_sums_survive_a_solve() -> None:
    equations = _equations(*_problem(50, 7, 2))
    gram = equations.gram.clone()
    first = solve_ridge(equations, dampening_frac=1e-4)
    assert torch.equal(equations.gram, gram)
    assert torch.equal(solve_ridge(equations, dampening_frac=1e-4).weight, first.weight)


def test_the_solution_does_not_depend_on_the_features_scale() -> None:
    x, y = _problem(60, 5, 2)
    scale = torch.tensor([1e-2, 1.0, 30.0, 1e2, 0.1], dtype=torch.float64)
    plain = solve_ridge(_equations(x, y), dampening_frac=1e-2)
    scaled = solve_ridge(_equations(x * scale, y), dampening_frac=1e-2)
    torch.testing.assert_close(scaled.weight * scale, plain.weight, rtol=1e-9, atol=1e-9)


def test_a_feature_that_does_not_vary_keeps_its_prior() -> None:
    x, y = _problem(60, 4, 2)
    x[:, 2] = 5.0
    prior = torch.full((2, 4), 0.7, dtype=torch.float64)
    solution = solve_ridge(_equations(x, y), dampening_frac=1e-4, prior_weight=prior)
    torch.testing.assert_close(solution.weight[:, 2], prior[:, 2])
    others = solve_ridge(_equations(x[:, [0, 1, 3]], y), dampening_frac=1e-4, prior_weight=prior[:, :3])
    torch.testing.assert_close(solution.weight[:, [0, 1, 3]], others.weight)


def test_too_few_positions_say_how_many() -> None:
    x, y = _problem(5, 8, 2)
    equations = NormalEquations(8, 2, label="up2.block1.conv2")
    equations.update(x, y)
    with pytest.raises(
        CalibrationError, match=r"up2\.block1\.conv2.* 5 positions for 9 unknowns.*more or longer clips"
    ):
        solve_ridge(equations, dampening_frac=0.0)
    solution = solve_ridge(equations, dampening_frac=1e-2)
    assert solution.num_rows < solution.num_unknowns


def test_bad_input_is_refused() -> None:
    equations = NormalEquations(2, 1, label="head")
    with pytest.raises(CalibrationError, match="no positions"):
        solve_ridge(equations, dampening_frac=1e-4)
    with pytest.raises(CalibrationError, match=r"head \(inputs\)"):
        equations.update(torch.tensor([[1.0, float("nan")]]), torch.zeros(1, 1))
    with pytest.raises(CalibrationError, match=r"head \(targets\)"):
        equations.update(torch.zeros(1, 2), torch.tensor([[float("inf")]]))
    equations.update(torch.ones(4, 2), torch.ones(4, 1))
    with pytest.raises(CalibrationError, match="no unique solution"):
        solve_ridge(equations, dampening_frac=1e-4)  # constant inputs: the damping is zero as well
