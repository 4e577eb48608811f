"""Separable fits against known kernels and against the dense error formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.least_squares import NormalEquations, relative_error
from flashvaed_cli.numerics.separable import fit_separable, frame_from_causal, separable_from_dense

_TAPS = (3, 2, 2)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _correlated_rows(num_rows: int, num_channels: int, num_taps: int) -> Tensor:
    """Features whose channels and taps are both correlated, as those of a video are."""
    across_channels = _randn(num_channels, num_channels, seed=1) / num_channels**0.5
    across_taps = torch.eye(num_taps, dtype=torch.float64) + 0.7
    rows = torch.einsum("nct,cd,ts->nds", _randn(num_rows, num_channels, num_taps), across_channels, across_taps)
    return rows.flatten(1) + 1.0


def _dense(depthwise: Tensor, pointwise: Tensor) -> Tensor:
    return pointwise[:, :, None, None, None] * depthwise


def _fit_problem(weight: Tensor, bias: Tensor, num_rows: int = 600) -> NormalEquations:
    x = _correlated_rows(num_rows, weight.shape[1], weight[0, 0].numel())
    equations = NormalEquations(x.shape[1], len(weight), exact=True)
    equations.update(x, x @ weight.flatten(1).T + bias)
    return equations


def test_svd_start_is_exact_for_separable_kernels_and_balanced() -> None:
    weight = _dense(_randn(4, *_TAPS), _randn(6, 4, seed=1))
    depthwise, pointwise = separable_from_dense(weight)
    torch.testing.assert_close(_dense(depthwise, pointwise), weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(depthwise.flatten(1).norm(dim=1), pointwise.norm(dim=0))
    taps = depthwise.flatten(1)
    assert bool((taps.gather(1, taps.abs().argmax(dim=1, keepdim=True)) > 0).all())


def test_svd_start_is_the_best_rank_one_per_channel() -> None:
    weight = _randn(6, 4, *_TAPS)
    depthwise, pointwise = separable_from_dense(weight.float())
    error = (weight - _dense(depthwise, pointwise)).square().sum()
    scale = torch.linalg.svdvals(weight.flatten(2).transpose(0, 1))
    assert float(error) == pytest.approx(float(scale[:, 1:].square().sum()), rel=1e-5)  # the input was float32


def test_svd_start_of_zero_channels_is_zero() -> None:
    weight = _randn(6, 4, *_TAPS)
    weight[:, 2] = 0.0
    depthwise, pointwise = separable_from_dense(weight)
    assert not bool((depthwise[2].flatten().norm() * pointwise[:, 2].norm()).any())
    assert bool(torch.isfinite(depthwise).all())


def test_fit_recovers_an_exactly_separable_kernel() -> None:
    weight = _dense(_randn(4, *_TAPS), _randn(6, 4, seed=1))
    bias = torch.arange(6, dtype=torch.float64)
    depthwise0 = _randn(4, *_TAPS) + 0.5 * _randn(4, *_TAPS, seed=5)
    fit = fit_separable(
        _fit_problem(weight, bias), depthwise0, _randn(6, 4, seed=6), num_iterations=200, dampening_frac=1e-10
    )
    assert fit.relative_error < 1e-10
    # Errors of 1e-10 in energy are 1e-5 in amplitude, times the conditioning of the correlated rows.
    torch.testing.assert_close(_dense(fit.depthwise, fit.pointwise), weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fit.bias, bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dampening_frac", [1e-6, 1e-2, 1.0])
def test_error_never_rises_and_beats_the_svd_start(dampening_frac: float) -> None:
    weight = _randn(6, 4, *_TAPS)
    equations = _fit_problem(weight, torch.zeros(6, dtype=torch.float64))
    depthwise0, pointwise0 = separable_from_dense(weight)
    fit = fit_separable(equations, depthwise0, pointwise0, num_iterations=10, dampening_frac=dampening_frac)
    assert len(fit.error_history) == 11
    steps = torch.tensor(fit.error_history, dtype=torch.float64).diff()
    assert float(steps.max()) <= 1e-12  # rounding of a difference of sums near 1
    assert fit.relative_error == fit.error_history[-1]
    assert fit.relative_error < 0.9 * fit.error_history[0]


def test_reported_error_is_that_of_the_dense_kernel() -> None:
    weight = _randn(6, 4, *_TAPS)
    equations = _fit_problem(weight, torch.ones(6, dtype=torch.float64))
    fit = fit_separable(equations, *separable_from_dense(weight), num_iterations=3, dampening_frac=1e-4)
    dense = _dense(fit.depthwise, fit.pointwise).flatten(1)
    assert relative_error(equations, dense, fit.bias) == pytest.approx(fit.relative_error, rel=1e-9)
    torch.testing.assert_close(fit.depthwise.flatten(1).norm(dim=1), fit.pointwise.norm(dim=0))


def test_depthwise_step_solves_its_normal_equations() -> None:
    """One step from far away lands where a dense solve of the same damped system does."""
    from flashvaed_cli.numerics.separable import _SeparableSums

    equations = _fit_problem(_randn(6, 4, *_TAPS), torch.zeros(6, dtype=torch.float64))
    sums = _SeparableSums(equations, 4)
    depthwise, pointwise = _randn(4, 12, seed=8), _randn(6, 4, seed=9)
    coupling = pointwise.T @ pointwise
    matrix = coupling.repeat_interleave(12, 0).repeat_interleave(12, 1) * equations.gram
    ridge = 1e-3 * float(matrix.diagonal().mean())
    right = torch.einsum("oc,cto->ct", pointwise, equations.cross.unflatten(0, (4, 12))).flatten()
    damped = matrix + ridge * torch.eye(48, dtype=torch.float64)
    expected = torch.linalg.solve(damped, right + ridge * depthwise.flatten()).view(4, 12)
    found = sums.solve_depthwise(depthwise, pointwise, 1e-3)
    # The conjugate gradients stop at 1e-6 of the first residual.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_fit_is_independent_of_targets_far_from_zero() -> None:
    weight = _randn(6, 4, *_TAPS)
    start = separable_from_dense(weight)
    fits = [
        fit_separable(
            _fit_problem(weight, torch.full((6,), offset, dtype=torch.float64)),
            *start,
            num_iterations=2,
            dampening_frac=1e-3,
        )
        for offset in (0.0, 100.0)
    ]
    torch.testing.assert_close(fits[0].pointwise, fits[1].pointwise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fits[0].bias + 100.0, fits[1].bias, rtol=1e-6, atol=1e-6)


def test_dead_inputs_are_refused() -> None:
    equations = NormalEquations(4 * 12, 6, label="mid.conv1")
    equations.update(torch.ones(10, 48), torch.ones(10, 6))
    with pytest.raises(CalibrationError, match=r"mid\.conv1"):
        fit_separable(equations, _randn(4, *_TAPS), _randn(6, 4), num_iterations=1, dampening_frac=1e-3)


def test_frame_kernel_is_exact_on_static_video() -> None:
    weight, frame = _randn(3, 2, 3, 3, 3), _randn(1, 2, 1, 5, 6, seed=1)
    causal = functional.conv3d(frame.expand(1, 2, 3, 5, 6), weight, padding=(0, 1, 1))
    per_frame = functional.conv2d(frame[:, :, 0], frame_from_causal(weight), padding=1)
    torch.testing.assert_close(causal[:, :, 0], per_frame, rtol=1e-12, atol=1e-12)
