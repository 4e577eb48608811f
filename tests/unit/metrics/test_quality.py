from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
import torch
import torchmetrics.functional.image  # noqa: F401  imported here so that no single test pays for it
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.metrics.quality import (
    PSNR_CAP_DB,
    QualityAccumulator,
    QualityResult,
    compare_frames,
    flicker,
    laplacian_energy,
    mean_quality,
    psnr_db,
    sharpness_ratio,
    ssim,
)


def clip(num_frames: int = 5, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, num_frames, side, side, generator=generator) * 1.6 - 0.8


def test_psnr_of_a_known_error() -> None:
    reference = clip()
    # an error of 0.02 on a range of 2 is -40 dB
    assert psnr_db(reference + 0.02, reference) == pytest.approx(40.0, abs=1e-4)  # float32 rounding of the sum
    assert psnr_db(reference, reference) == math.inf


def test_psnr_aggregates_errors_not_decibels() -> None:
    reference = torch.zeros(3, 2, 8, 8)
    output = reference.clone()
    output[:, 1] = 0.2
    assert psnr_db(output, reference) == pytest.approx(10 * math.log10(4 / 0.02), abs=1e-5)


def test_ssim_against_the_definition_at_a_pixel() -> None:
    """The centre of an 11 x 11 frame pair, by the textbook formula in float64; other pixels are reflections."""
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(1, 1, 21, 21, generator=generator, dtype=torch.float64)
    b = (a + 0.1 * torch.rand(1, 1, 21, 21, generator=generator, dtype=torch.float64)).clamp(0, 1)
    ramp = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(ramp, ramp) / ramp.sum() ** 2
    a_padded, b_padded = (torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect")[0, 0] for x in (a, b))
    values = []
    for row in range(21):
        for column in range(21):
            pa, pb = (x[row : row + 11, column : column + 11] for x in (a_padded, b_padded))
            ma, mb = (window * pa).sum(), (window * pb).sum()
            va, vb = (window * (pa - ma) ** 2).sum(), (window * (pb - mb) ** 2).sum()
            vab = (window * (pa - ma) * (pb - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    expected = float(torch.stack(values).mean())
    frames_a, frames_b = ((x.float() * 2 - 1).expand(3, 1, 21, 21) for x in (a[0], b[0]))
    assert ssim(frames_a, frames_b) == pytest.approx(expected, abs=1e-5)  # float32 against float64


def test_ssim_of_equal_clips_and_of_frames_below_the_window() -> None:
    assert ssim(clip(), clip()) == pytest.approx(1.0, abs=1e-6)
    assert ssim(clip(side=11), clip(side=11)) is not None
    assert ssim(clip(side=10), clip(side=10)) is None


def test_laplacian_energy_of_a_parabola() -> None:
    """x² has the Laplacian 2 everywhere."""
    parabola = (torch.arange(9.0) ** 2).expand(3, 2, 9, 9)
    assert laplacian_energy(parabola) == pytest.approx(4.0, rel=1e-5)
    assert laplacian_energy(clip(side=2)) is None


def test_sharpness_ratio() -> None:
    reference = clip()
    assert sharpness_ratio(reference * 0.5, reference) == pytest.approx(0.25, rel=1e-5)
    assert sharpness_ratio(reference, torch.zeros_like(reference)) is None


def test_flicker_ignores_a_constant_error_and_sees_an_alternating_one() -> None:
    reference = clip()
    signs = torch.tensor([1.0, -1, 1, -1, 1]).view(1, 5, 1, 1)
    assert flicker(reference + 0.1, reference) == pytest.approx(0.0, abs=1e-6)
    assert flicker(reference + 0.1 * signs, reference) == pytest.approx(0.2, abs=1e-6)
    assert flicker(clip(1), clip(1)) is None


@settings(deadline=None, max_examples=15)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4), batch=st.integers(1, 2))
def test_every_chunking_gives_the_same_figures(chunks: list[int], batch: int) -> None:
    num_frames = sum(chunks)
    reference = torch.stack([clip(num_frames, seed=i) for i in range(batch)])
    output = (reference + 0.2 * torch.stack([clip(num_frames, seed=10 + i) for i in range(batch)])).clamp(-1, 1)
    accumulator = QualityAccumulator()
    for y, r in zip(output.split(chunks, dim=2), reference.split(chunks, dim=2), strict=True):
        accumulator.update(y, r)
    streamed, whole = accumulator.result(), compare_frames(output, reference)
    # float64 sums of float32 frame means: only the order of addition differs
    assert streamed.psnr_db == pytest.approx(whole.psnr_db, abs=1e-6)
    assert streamed.ssim == pytest.approx(whole.ssim, abs=1e-6)
    assert streamed.sharpness_ratio == pytest.approx(whole.sharpness_ratio, rel=1e-6)
    assert streamed.num_frames == whole.num_frames == batch * num_frames
    if num_frames == 1:
        assert streamed.flicker is None
    else:
        assert streamed.flicker == pytest.approx(whole.flicker, rel=1e-6)


def test_accumulator_agrees_with_the_functions() -> None:
    reference, output = clip(), clip(seed=3)
    result = compare_frames(output, reference)
    assert result.psnr_db == pytest.approx(psnr_db(output, reference), abs=1e-6)
    assert result.ssim == pytest.approx(ssim(output, reference), abs=1e-6)
    assert result.flicker == pytest.approx(flicker(output, reference), abs=1e-6)
    assert result.sharpness_ratio == pytest.approx(sharpness_ratio(output, reference), rel=1e-6)
    assert result.lpips is None
    with pytest.raises(FrozenInstanceError):
        result.psnr_db = 0.0  # type: ignore[misc]


def test_accumulator_compares_what_a_video_would_show() -> None:
    assert compare_frames(torch.full((3, 2, 12, 12), 1.5), torch.ones(3, 2, 12, 12)).psnr_db == math.inf


def test_accumulator_feeds_lpips_frames_and_skips_small_ones() -> None:
    seen: list[tuple[int, ...]] = []

    def first_pixel(output: Tensor, reference: Tensor) -> Tensor:
        seen.append(tuple(output.shape))
        return output[:, 0, 0, 0] - reference[:, 0, 0, 0]

    reference = clip(num_frames=6)
    result = compare_frames(reference + 0.1, reference, lpips=first_pixel)
    assert result.lpips == pytest.approx(0.1, abs=1e-6)
    assert sum(shape[0] for shape in seen) == 6
    assert {shape[1:] for shape in seen} == {(3, 16, 16)}
    assert compare_frames(reference, reference, lpips=first_pixel, lpips_min_side=17).lpips is None


def test_a_nan_stays_visible() -> None:
    broken = clip()
    broken[0, 0, 0, 0] = math.nan
    result = compare_frames(broken, clip())
    assert math.isnan(result.psnr_db)
    assert math.isnan(mean_quality([result, compare_frames(clip(), clip())]).psnr_db)


def test_mean_over_clips() -> None:
    one = QualityResult(psnr_db=30.0, ssim=0.8, lpips=None, sharpness_ratio=1.0, flicker=0.1, num_frames=5)
    two = replace(one, psnr_db=math.inf, ssim=None, sharpness_ratio=0.5, num_frames=1)
    mean = mean_quality([one, two])
    assert mean == QualityResult((30 + PSNR_CAP_DB) / 2, 0.8, None, 0.75, 0.1, 6)
    with pytest.raises(ValueError, match="no clips"):
        mean_quality([])


def test_bad_use() -> None:
    with pytest.raises(ValueError, match="no frames"):
        QualityAccumulator().result()
    with pytest.raises((TypeError, ValueError)):  # jaxtyping's when shapes are checked, else the function's own
        QualityAccumulator().update(clip(4), clip(5))


def _ms_ssim_by_hand(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Of one grey-valued frame `[H, W]` in [0, 1], in float64 by scipy's filters: contrast and structure at five
    scales, luminance at the last, which torchmetrics takes with mirrored borders (the others without)."""
    from scipy.ndimage import correlate1d

    x, y = output.double().numpy(), reference.double().numpy()
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blurred(image: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(image, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")

    product = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y, both = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2, blurred(x * y) - mean_x * mean_y
        contrast = (2 * both + 0.03**2) / (var_x + var_y + 0.03**2)
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        inner = contrast[5:-5, 5:-5]
        product *= float((contrast * luminance if scale == 4 else inner).mean()) ** weight
        x, y = (z[: z.shape[0] // 2 * 2, : z.shape[1] // 2 * 2] for z in (x, y))
        x, y = (z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2).mean((1, 3)) for z in (x, y))
    return product


def test_ms_ssim_is_the_published_one() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.nn.functional.interpolate(torch.rand(1, 1, 24, 28, generator=generator), (192, 224))[0, 0]
    output = (reference + 0.2 * torch.rand(192, 224, generator=generator)).clamp(0, 1)
    grey = [(2 * image - 1).expand(3, 1, -1, -1) for image in (output, reference)]
    found = compare_frames(*grey, thorough=True).ms_ssim
    assert found == pytest.approx(_ms_ssim_by_hand(output, reference), abs=1e-5)
    assert compare_frames(clip(), clip(), thorough=True).ms_ssim is None  # too small for five scales
    assert compare_frames(*grey).ms_ssim is None


@pytest.mark.parametrize("chunks", [(9,), (1, 4, 4), (2, 3, 1, 3)])
def test_flicker_at_borders_is_that_of_first_frames_of_latents(chunks: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    output, reference = (torch.rand(3, 9, 12, 12, generator=generator) * 2 - 1 for _ in range(2))
    accumulator = QualityAccumulator(frames_per_latent=4)
    for one, other in zip(output.split(chunks, dim=1), reference.split(chunks, dim=1), strict=True):
        accumulator.update(one, other)
    change = (output - reference).diff(dim=1).abs().mean(dim=(0, 2, 3))  # of frame 1, 2, ...
    assert accumulator.result().border_flicker == pytest.approx(float(change[[0, 4]].mean()), rel=1e-5)
    assert compare_frames(output, reference).border_flicker is None
    assert compare_frames(output, output, frames_per_latent=4).border_flicker == 0


def test_first_and_worst_frame() -> None:
    reference = torch.zeros(3, 5, 12, 12)
    output = reference + torch.tensor([0.2, 0.1, 0.4, 0.0, 0.1]).view(1, 5, 1, 1)
    result = compare_frames(output, reference)
    assert result.first_frame_psnr_db == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)
    assert result.worst_frame_psnr_db == pytest.approx(10 * math.log10(4 / 0.16), abs=1e-4)
    same = compare_frames(reference, reference, thorough=True, frames_per_latent=4)
    assert same.worst_frame_psnr_db == same.first_frame_psnr_db == math.inf
    mean = mean_quality([result, same])
    assert mean.worst_frame_psnr_db == result.worst_frame_psnr_db  # the worst of all clips
    assert mean.first_frame_psnr_db is not None and math.isfinite(mean.first_frame_psnr_db)
    one_frame = compare_frames(output[:, :1], reference[:, :1], thorough=True, frames_per_latent=4)
    assert one_frame.flicker is None and one_frame.border_flicker is None and one_frame.delta_e is not None


def test_large_frames_are_compared_one_by_one_with_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = torch.rand(2, 3, 5, 20, 24, generator=torch.Generator().manual_seed(4)).unbind()
    together = compare_frames(one, other, thorough=True)
    monkeypatch.setattr("flashvaed_cli.metrics.quality.PIXELS_PER_PASS", 20 * 24)
    alone = compare_frames(one, other, thorough=True)
    ours, theirs = ({k: v for k, v in asdict(one).items() if v is not None} for one in (alone, together))
    assert ours == pytest.approx(theirs, rel=1e-6)  # float32 sums in another order
