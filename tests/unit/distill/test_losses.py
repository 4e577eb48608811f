from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from flashvaed_cli.decoders.modules.operators import frames_as_batch
from flashvaed_cli.distill.losses import (
    FRAME_LOSSES,
    clamped_error,
    energy_loss,
    l1_loss,
    psnr_of_error_db,
    r2_loss,
    sharpness_loss,
    ssim_loss,
    temporal_loss,
    wavelet_loss,
)


def frames(seed: int = 0, *, num_frames: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, num_frames, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", FRAME_LOSSES)
@pytest.mark.parametrize("side", [1, 2, 7, 16])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_equal_frames_cost_nothing_and_others_something(name: str, side: int, num_frames: int) -> None:
    clip = frames(num_frames=num_frames, side=side)
    other = frames(1, num_frames=num_frames, side=side).requires_grad_()
    assert float(FRAME_LOSSES[name](clip, clip)) == pytest.approx(0, abs=1e-6)
    loss = FRAME_LOSSES[name](other, clip)
    loss.backward()
    assert other.grad is not None and torch.isfinite(other.grad).all()
    silent = (
        (name == "temporal" and num_frames == 1)
        or (name == "sharpness" and side == 1)
        or (name == "energy" and side < 3)
        or (name == "wavelet" and side < 2)
    )
    assert (float(loss.detach()) > 0) is not silent


def test_ssim_is_torchmetrics_without_its_padding() -> None:
    a, b = frames(side=24), frames(1, side=24) * 0.3
    _, image = structural_similarity_index_measure(
        frames_as_batch(a), frames_as_batch(b), data_range=2.0, return_full_image=True
    )
    inner = image[..., 5:-5, 5:-5]  # windows that lie in the frame
    assert float(1 - ssim_loss(a, b)) == pytest.approx(float(inner.mean()), abs=1e-5)


def test_blur_costs_more_sharpness_than_a_shift_of_brightness_of_the_same_l1() -> None:
    clip = frames()
    blurred = torch.nn.functional.avg_pool3d(clip, (1, 3, 3), 1, (0, 1, 1))
    brighter = clip + l1_loss(blurred, clip)
    assert float(l1_loss(brighter, clip)) == pytest.approx(float(l1_loss(blurred, clip)), rel=1e-5)
    assert float(sharpness_loss(brighter, clip)) < 1e-5 < 0.1 < float(sharpness_loss(blurred, clip))


def test_temporal_loss_sees_flicker_but_no_constant_offset() -> None:
    clip = frames(num_frames=4)
    flicker = torch.tensor([0.1, -0.1, 0.1, -0.1]).view(1, 1, 4, 1, 1)
    assert float(temporal_loss(clip + 0.1, clip)) == pytest.approx(0, abs=1e-6)
    assert float(temporal_loss(clip + flicker, clip)) == pytest.approx(0.2, abs=1e-5)


def features() -> torch.Tensor:
    """Five channels, the last two nearly combinations of the others."""
    free = torch.randn(2, 3, 2, 6, 6)
    mix = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, 1.0]])
    bound = torch.einsum("oc,bcthw->bothw", mix, free) + 0.3 * torch.randn(2, 2, 2, 6, 6) + 5.0
    return torch.cat([free, bound], dim=1)


def test_r2_loss_is_the_residual_of_least_squares_with_intercept() -> None:
    values, kept = features(), [0, 1, 2]
    rows = values.double().movedim(1, -1).flatten(0, -2)
    design = torch.cat([rows[:, kept], torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    residual = rows - design @ torch.linalg.lstsq(design, rows).solution
    expected = residual.square().sum() / (rows - rows.mean(dim=0)).square().sum()
    assert float(r2_loss(values, kept)) == pytest.approx(float(expected), rel=1e-4)  # float32 covariance
    assert float(r2_loss(values, range(5))) == pytest.approx(0, abs=1e-5)


def test_r2_gradient_is_that_of_differences() -> None:
    values, kept = features().double(), [1, 3]
    direction = torch.randn_like(values)
    values.requires_grad_()
    (gradient,) = torch.autograd.grad(r2_loss(values, kept), values)
    step = 1e-4
    with torch.no_grad():
        slope = (r2_loss(values + step * direction, kept) - r2_loss(values - step * direction, kept)) / (2 * step)
    # The ridge of 1e-6 makes the fixed map miss the minimum by about as much.
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), abs=1e-5)
    assert abs(float(slope)) > 1e-3


def test_r2_loss_survives_dead_and_constant_channels() -> None:
    values = torch.zeros(1, 4, 1, 3, 3, requires_grad=True)
    loss = r2_loss(values, [0, 2])
    loss.backward()
    assert float(loss.detach()) == 0 and values.grad is not None and torch.isfinite(values.grad).all()


def test_psnr_is_taken_after_clamping_and_of_the_mean_error() -> None:
    teacher = torch.ones(2, 3, 1, 4, 4)
    student = teacher.clone()
    student[0] -= 0.2
    student[1] += 1.0  # clamps away
    error = float(clamped_error(student, teacher))
    assert error == pytest.approx(0.02)
    assert psnr_of_error_db(error) == pytest.approx(10 * math.log10(4 / 0.02))
    assert psnr_of_error_db(0.0) == 120.0


def test_energy_wants_detail_back_that_sharpness_would_rather_not_have() -> None:
    """Detail that the student cannot place, such as grain: of the right scale, but independent of the teacher's."""
    teacher = 0.5 * torch.randn(4, 3, 2, 32, 32)
    detail = 0.5 * torch.randn(4, 3, 2, 32, 32)
    strength = torch.tensor(0.3, requires_grad=True)
    (of_sharpness,) = torch.autograd.grad(sharpness_loss(strength * detail, teacher), strength)
    (of_energy,) = torch.autograd.grad(energy_loss(strength * detail, teacher), strength)
    assert float(of_sharpness) > 0.01  # a step down this gradient softens
    assert float(of_energy) < -0.1  # and down this one sharpens


def test_energy_is_what_a_blur_loses_and_a_shift_keeps() -> None:
    teacher = frames(side=32)
    assert float(energy_loss(teacher.roll(16, dims=-1), teacher)) < 0.1  # the same detail elsewhere
    half = 0.5 * teacher
    assert float(energy_loss(half, teacher)) == pytest.approx(2 * math.log(2), abs=1e-3)  # in every octave
    blurred = torch.nn.functional.avg_pool3d(teacher, (1, 3, 3), 1, (0, 1, 1)).requires_grad_()
    loss = energy_loss(blurred, teacher)
    (gradient,) = torch.autograd.grad(loss, blurred)
    sharper = (blurred - 20 * gradient).detach()
    assert float(energy_loss(sharper, teacher)) < float(loss.detach()) - 0.01
    assert float(loss.detach()) > 0.3


def test_wavelet_bands_are_sums_and_differences_of_neighbours() -> None:
    frames = torch.randn(2, 3, 5, 6, 8)
    first, later = frames[:, :, :1], frames[:, :, 1:]

    def bands(x: Tensor, dims: tuple[int, ...]) -> dict[tuple[int, ...], Tensor]:
        found: dict[tuple[int, ...], Tensor] = {}
        for signs in itertools.product((1, -1), repeat=len(dims)):
            band = x
            for sign, dim in zip(signs, dims, strict=True):
                even, odd = (band.index_select(dim, torch.arange(i, band.shape[dim], 2)) for i in (0, 1))
                band = even + sign * odd
            found[signs] = band
        return found

    image, video = bands(first, (3, 4)), bands(later, (2, 3, 4))
    low = [image.pop((1, 1)), video.pop((1, 1, 1))]
    high = [*image.values(), *video.values()]
    expected = (
        torch.stack([b.abs().mean() for b in high]).mean() + 0.5 * torch.stack([b.abs().mean() for b in low]).mean()
    )
    torch.testing.assert_close(wavelet_loss(frames, torch.zeros_like(frames)), expected)
    assert wavelet_loss(frames, frames) == 0
    assert wavelet_loss(frames[..., :1], torch.zeros(2, 3, 5, 6, 1)) == 0  # a column has no pairs


def test_every_haar_band_feels_its_own_detail() -> None:
    checker = torch.ones(1, 3, 1, 4, 4)
    checker[..., 0::2, 1::2] = checker[..., 1::2, 0::2] = -1
    flat = torch.ones(1, 3, 1, 4, 4)
    still = torch.zeros(1, 3, 1, 4, 4)
    # One of three high bands is 4; the flat picture is in the low band alone, which counts half.
    assert wavelet_loss(checker, still) == pytest.approx(4 / 3)
    assert wavelet_loss(flat, still) == pytest.approx(0.5 * 4)
