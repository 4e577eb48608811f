"""Separable fits against known kernels and against dense normal equations by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.separable import (
    SeparableFit,
    _conjugate_gradients,
    _SeparableProblem,
    fit_separable,
    frame_from_causal,
    separable_from_dense,
    separable_start,
)

_TAPS = (3, 2, 2)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _patches(num_channels: int = 4, num_rows: int = 600) -> Tensor:
    """Patches whose channels and taps are both correlated, as those of a video are; [C, N, taps]."""
    across_channels = _randn(num_channels, num_channels, seed=1) / num_channels**0.5
    across_taps = torch.eye(12, dtype=torch.float64) + 0.7
    rows = _randn(num_rows, num_channels, 12)
    return torch.einsum("nct,cd,ts->dns", rows, across_channels, across_taps).contiguous() + 1.0


def _dense(depthwise: Tensor, pointwise: Tensor) -> Tensor:
    return pointwise[:, :, None, None, None] * depthwise


def _outputs(patches: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return torch.einsum("cnt,oct->no", patches, weight.flatten(2)) + bias


def _error(patches: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | float) -> float:
    squared = (_outputs(patches, weight, bias) - targets).square().sum()
    return float(squared / (targets - targets.mean(dim=0)).square().sum())


def _fit(weight: Tensor, patches: Tensor, targets: Tensor, num_iterations: int = 3, frac: float = 1e-4) -> SeparableFit:
    start = separable_from_dense(weight)
    return fit_separable(patches.clone(), targets, *start, num_iterations=num_iterations, dampening_frac=frac)


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


def test_start_in_the_datas_metric_is_the_white_one_for_white_data() -> None:
    weight = _randn(6, 4, *_TAPS)
    white = 3.0 * torch.eye(12, dtype=torch.float64).expand(4, -1, -1)
    for found, expected in zip(separable_start(weight, white), separable_from_dense(weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_start_in_the_datas_metric_is_the_best_rank_one_there() -> None:
    weight, patches = _randn(6, 4, *_TAPS), _patches()
    centred = patches - patches.mean(dim=1, keepdim=True)
    weighted = torch.linalg.cholesky(centred.mT @ centred)  # [C, taps, taps]

    def error(start: tuple[Tensor, Tensor]) -> float:
        difference = (weight - _dense(*start)).flatten(2).transpose(0, 1)  # [C, O, taps]
        return float((difference @ weighted).square().sum())

    scale = torch.linalg.svdvals(weight.flatten(2).transpose(0, 1) @ weighted)
    found = error(separable_start(weight, centred.mT @ centred))
    assert found == pytest.approx(float(scale[:, 1:].square().sum()), rel=1e-5)  # its ridge is 1e-6
    assert found < 0.9 * error(separable_from_dense(weight))


def test_start_takes_a_channel_that_never_varies_as_white() -> None:
    weight, grams = _randn(6, 4, *_TAPS), torch.eye(12, dtype=torch.float64).repeat(4, 1, 1)
    grams[2] = 0.0
    for found, expected in zip(separable_start(weight, grams), separable_from_dense(weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_fit_recovers_an_exactly_separable_kernel() -> None:
    weight, patches = _dense(_randn(4, *_TAPS), _randn(6, 4, seed=1)), _patches()
    bias = torch.arange(6, dtype=torch.float64)
    depthwise0 = _randn(4, *_TAPS) + 0.5 * _randn(4, *_TAPS, seed=5)
    targets, start = _outputs(patches, weight, bias), (depthwise0, _randn(6, 4, seed=6))
    fit = fit_separable(patches, targets, *start, num_iterations=70, dampening_frac=1e-10)
    assert fit.relative_error < 1e-10
    # Errors of 1e-10 in energy are 1e-5 in amplitude, times the conditioning of the correlated rows.
    torch.testing.assert_close(_dense(fit.depthwise, fit.pointwise), weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fit.bias, bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dampening_frac", [1e-6, 1e-2, 1.0])
def test_error_never_rises_and_beats_the_svd_start(dampening_frac: float, dtype: torch.dtype) -> None:
    weight, patches = _randn(6, 4, *_TAPS), _patches()
    fit = _fit(weight, patches.to(dtype), _outputs(patches, weight), 10, dampening_frac)
    assert len(fit.error_history) == 11
    assert float(torch.tensor(fit.error_history, dtype=torch.float64).diff().max()) <= 0.0
    assert fit.relative_error == fit.error_history[-1]
    assert fit.relative_error < 0.9 * fit.start_error


def test_reported_errors_are_those_of_the_dense_kernels() -> None:
    weight, patches, bias0 = _randn(6, 4, *_TAPS), _patches(), _randn(6, seed=3)
    targets = _outputs(patches, weight, 1.0)
    start = separable_from_dense(weight)
    fit = fit_separable(patches.clone(), targets, *start, num_iterations=3, dampening_frac=1e-4, bias0=bias0)
    found = _error(patches, targets, _dense(fit.depthwise, fit.pointwise), fit.bias)
    assert found == pytest.approx(fit.relative_error, rel=1e-9)
    assert _error(patches, targets, _dense(*start), bias0) == pytest.approx(fit.start_error, rel=1e-9)
    torch.testing.assert_close(fit.depthwise.flatten(1).norm(dim=1), fit.pointwise.norm(dim=0))


def test_pointwise_step_alone_is_the_ordinary_least_squares() -> None:
    weight, patches = _randn(6, 4, *_TAPS), _patches()
    targets = _outputs(patches, weight, 2.0)
    fit = _fit(weight, patches, targets, num_iterations=0, frac=1e-12)
    outputs = torch.einsum("cnt,ct->nc", patches, fit.depthwise.flatten(1))
    features = torch.cat([outputs, torch.ones(600, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(features, targets).solution
    torch.testing.assert_close(torch.cat([fit.pointwise.T, fit.bias[None]]), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-2), (torch.float64, 1e-2)])
def test_depthwise_step_solves_its_normal_equations(dtype: torch.dtype, tolerance: float) -> None:
    """One step from far away lands where a dense solve of the same damped system does."""
    weight, patches = _randn(6, 4, *_TAPS), _patches()
    problem = _SeparableProblem(patches.to(dtype), _outputs(patches, weight), 1e-3, "layer")
    factors = problem.evaluate(_randn(4, 12, seed=8), _randn(6, 4, seed=9))
    centred = patches - patches.mean(dim=1, keepdim=True)
    features = torch.einsum("cnt,oc->noct", centred, factors.pointwise).flatten(2).flatten(0, 1)  # [N*O, K]
    targets = _outputs(centred, weight)
    gram = features.T @ features
    ridge = 1e-3 * gram.diagonal().view(4, 12).mean(dim=1).repeat_interleave(12)
    right = features.T @ targets.flatten() + ridge * factors.depthwise.flatten()
    expected = torch.linalg.solve(gram + ridge.diag(), right).view(4, 12)
    # The conjugate gradients stop at 1e-3 of the first residual, or after ten steps.
    found = problem.solve_depthwise(factors)
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_conjugate_gradients_solve_a_system_and_stop_at_zero() -> None:
    root = _randn(12, 12)
    matrix, right = root @ root.T + torch.eye(12, dtype=torch.float64), _randn(3, 4, seed=1)

    def apply(x: Tensor) -> Tensor:
        return (matrix @ x.flatten()).view(3, 4)

    found = _conjugate_gradients(apply, lambda x: x, right, max_steps=30, tolerance=1e-10)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right.flatten()).view(3, 4))
    assert not bool(_conjugate_gradients(apply, lambda x: x, torch.zeros_like(right)).any())


def test_float32_fit_is_the_float64_one_to_rounding() -> None:
    weight, patches = _randn(6, 4, *_TAPS), _patches().float().double()
    targets = _outputs(patches, weight, 5.0)
    exact, rounded = (_fit(weight, patches.to(dtype), targets) for dtype in (torch.float64, torch.float32))
    assert rounded.relative_error == pytest.approx(exact.relative_error, rel=1e-5)
    # Float32 products are good to about 1e-6, times the conditioning of the correlated rows.
    torch.testing.assert_close(rounded.pointwise, exact.pointwise, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rounded.bias, exact.bias, rtol=1e-3, atol=1e-3)


def test_a_dense_weight_lends_a_better_start() -> None:
    weight, patches = _randn(6, 4, *_TAPS), _patches()
    targets, poor = _outputs(patches, weight), (_randn(4, *_TAPS, seed=8), _randn(6, 4, seed=9))
    errors = [
        fit_separable(
            patches.clone(), targets, *poor, num_iterations=0, dampening_frac=1e-4, dense_weight=dense
        ).relative_error
        for dense in (None, weight)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_a_good_start_is_kept_where_the_dense_weight_misleads() -> None:
    weight, patches = _dense(_randn(4, *_TAPS), _randn(6, 4, seed=1)), _patches()
    start, targets = separable_from_dense(weight), _outputs(patches, weight)
    misleading = _randn(6, 4, *_TAPS, seed=7)
    fit = fit_separable(patches, targets, *start, num_iterations=1, dampening_frac=1e-4, dense_weight=misleading)
    assert fit.relative_error <= fit.start_error < 1e-12


def test_fit_is_independent_of_offsets_far_from_zero() -> None:
    weight, patches = _randn(6, 4, *_TAPS), _patches()
    fits = [
        _fit(weight, patches + shift, _outputs(patches, weight, offset))
        for shift, offset in ((0.0, 0.0), (0.0, 100.0), (50.0, 0.0))
    ]
    for fit, step in zip(fits[1:], (100.0, -50.0), strict=True):
        torch.testing.assert_close(fits[0].pointwise, fit.pointwise, rtol=1e-6, atol=1e-6)
        moved = 100.0 if step > 0 else step * _dense(fit.depthwise, fit.pointwise).flatten(1).sum(dim=1)
        torch.testing.assert_close(fits[0].bias + moved, fit.bias, rtol=1e-6, atol=1e-5)


def test_dead_channels_stay_zero_and_harm_nobody() -> None:
    weight, patches = _randn(6, 4, *_TAPS), _patches()
    patches[3] = 2.0  # an input that never varies
    targets = _outputs(patches, weight)
    weight[:, 2] = 0.0
    depthwise0, pointwise0 = separable_from_dense(weight)
    depthwise0[2] = 0.0
    fit = fit_separable(patches, targets, depthwise0, pointwise0, num_iterations=3, dampening_frac=1e-4)
    assert not bool(fit.depthwise[2].any() or fit.pointwise[:, 2].any())
    torch.testing.assert_close(
        _dense(fit.depthwise, fit.pointwise)[:, 3], _dense(depthwise0, pointwise0)[:, 3], rtol=1e-9, atol=1e-9
    )
    assert fit.relative_error < fit.start_error


def test_taps_that_all_read_the_same_are_no_obstacle_in_float32() -> None:
    weight = _randn(6, 4, *_TAPS)
    patches = _randn(4, 300, 1).expand(-1, -1, 12)
    targets = _outputs(patches, weight)
    fit = _fit(weight, patches.float().contiguous(), targets, num_iterations=2, frac=1e-10)
    assert fit.relative_error < 1e-8


def test_patches_are_centred_in_place_also_under_inference_mode() -> None:
    weight = _randn(6, 4, *_TAPS)
    with torch.inference_mode():
        patches = _patches().float()
        before, targets = patches.clone(), _outputs(patches.double(), weight)
        fit_separable(patches, targets, *separable_from_dense(weight), num_iterations=1, dampening_frac=1e-4)
    torch.testing.assert_close(patches, before - before.mean(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_rows", "spoil", "message"),
    [
        (600, "patch", r"mid\.conv1 \(inputs\): NaN"),
        (600, "target", r"mid\.conv1 \(targets\): NaN"),
        (600, "start", r"mid\.conv1 \(weights to start from\): NaN"),
        (600, "flat", r"mid\.conv1: no unique solution: none of its inputs varies"),
        (0, "", r"mid\.conv1: no positions"),
        (4, "", r"mid\.conv1: 4 positions for the 5 unknowns .* more or larger clips"),
    ],
)
def test_data_that_cannot_support_a_fit_is_refused(num_rows: int, spoil: str, message: str) -> None:
    patches, targets = _patches()[:, :num_rows].contiguous(), _randn(num_rows, 6)
    depthwise0, pointwise0 = _randn(4, *_TAPS), _randn(6, 4)
    if spoil == "patch":
        patches[1, 2, 3] = float("nan")
    elif spoil == "target":
        targets[1, 2] = float("inf")
    elif spoil == "start":
        pointwise0[0, 0] = float("nan")
    elif spoil == "flat":
        patches.fill_(1.0)
    with pytest.raises(CalibrationError, match=message):
        fit_separable(
            patches, targets, depthwise0, pointwise0, num_iterations=1, dampening_frac=1e-3, label="mid.conv1"
        )


def test_misuse_is_a_bug() -> None:
    weight, patches = _randn(6, 4, *_TAPS), _patches()
    targets = _outputs(patches, weight)
    for bad in (patches.half(), patches.mT.contiguous().mT):
        with pytest.raises(ValueError, match="contiguous float32"):
            _fit(weight, bad, targets)
    with pytest.raises(ValueError, match="dampening_frac"):
        _fit(weight, patches, targets, frac=0.0)


def test_frame_kernel_is_exact_on_static_video() -> None:
    weight, frame = _randn(3, 2, 3, 3, 3), _randn(1, 2, 1, 5, 6, seed=1)
    causal = functional.conv3d(frame.expand(1, 2, 3, 5, 6), weight, padding=(0, 1, 1))
    per_frame = functional.conv2d(frame[:, :, 0], frame_from_causal(weight), padding=1)
    torch.testing.assert_close(causal[:, :, 0], per_frame, rtol=1e-12, atol=1e-12)
