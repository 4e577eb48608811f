"""Covariance sums against the covariance of all the data at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.covariance import CovarianceAccumulator


def _clips(num_clips: int, *, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    clips = [torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64) @ mixing for _ in range(num_clips)]
    return [(clip.movedim(-1, 1) + offset).to(dtype) for clip in clips]


def _oracle(clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.cat([clip.double().movedim(1, -1).reshape(-1, clip.shape[1]) for clip in clips])
    centred = rows - rows.mean(dim=0)
    return rows.mean(dim=0), centred.T @ centred / len(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_the_covariance_of_all_clips(dtype: torch.dtype, tolerance: float) -> None:
    clips = _clips(3, dtype=dtype)
    accumulator = CovarianceAccumulator(6)
    for clip in clips:
        accumulator.update(clip)
    mean, covariance = _oracle(clips)
    assert accumulator.count == 3 * 2 * 3 * 4 * 5
    # Float32 products: 1e-7 each, relative to the largest variance.
    assert (accumulator.covariance() - covariance).abs().max() < tolerance * covariance.abs().max()
    assert (accumulator.mean - mean).abs().max() < tolerance * covariance.abs().max()
    assert torch.equal(accumulator.covariance(), accumulator.covariance().T)


def test_a_large_mean_costs_no_accuracy() -> None:
    clips = _clips(3, offset=1000.0)
    accumulator = CovarianceAccumulator(6)
    for clip in clips:
        accumulator.update(clip)
    covariance = _oracle(clips)[1]
    # Without the shift, squares of 1e6 in float32 would leave an error of about 0.1.
    assert (accumulator.covariance() - covariance).abs().max() < 1e-5 * covariance.abs().max()


@given(split=st.integers(0, 4))
@settings(max_examples=5, deadline=None)
def test_merge_equals_one_accumulator(split: int) -> None:
    clips = _clips(4, dtype=torch.float64)
    clips[3] += 7.0  # another mean than the first batch's shift
    left, right = CovarianceAccumulator(6), CovarianceAccumulator(6)
    for index, clip in enumerate(clips):
        (left if index < split else right).update(clip)
    before = None if right.count == 0 else right.covariance()
    left.merge(right)
    mean, covariance = _oracle(clips)
    torch.testing.assert_close(left.covariance(), covariance, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(left.mean, mean, rtol=1e-11, atol=1e-11)
    assert before is None or torch.equal(before, right.covariance())


def test_wider_than_a_panel_and_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvaed_cli.numerics.accumulation._PANEL_WIDTH", 4)
    monkeypatch.setattr("flashvaed_cli.numerics.covariance.rows_per_block", lambda _: 7)
    clips = _clips(2, dtype=torch.float64)
    accumulator = CovarianceAccumulator(6)
    for clip in clips:
        accumulator.update(clip)
    torch.testing.assert_close(accumulator.covariance(), _oracle(clips)[1], rtol=1e-11, atol=1e-11)


def test_inference_mode_autocast_and_matrices_without_positions() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    accumulator = CovarianceAccumulator(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        accumulator.update(rows[:25] + 0)
    accumulator.update(rows[25:])
    # bfloat16 products would be off by 1e-2.
    torch.testing.assert_close(accumulator.covariance(), _oracle([rows])[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named(bad: float) -> None:
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1, 0, 1] = bad
    with pytest.raises(CalibrationError, match=r"up3\.block0"):
        CovarianceAccumulator(3, label="up3.block0").update(x)


def test_wrong_width_and_no_data_are_refused() -> None:
    accumulator = CovarianceAccumulator(3, label="mid")
    with pytest.raises(CalibrationError, match="mid: 3 channels expected"):
        accumulator.update(torch.zeros(1, 4, 2))
    accumulator.update(torch.zeros(0, 3, 2))
    with pytest.raises(CalibrationError, match="at least one clip"):
        accumulator.covariance()
    with pytest.raises(CalibrationError, match="at least one clip"):
        _ = accumulator.mean


def test_the_callers_precision_setting_is_left_alone() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        accumulator = CovarianceAccumulator(6)
        accumulator.update(_clips(1)[0])
        assert torch.get_float32_matmul_precision() == "medium"
        assert (accumulator.covariance() - _oracle(_clips(1))[1]).abs().max() < 1e-4
    finally:
        torch.set_float32_matmul_precision(before)
