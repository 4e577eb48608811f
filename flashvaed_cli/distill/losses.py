"""The terms of the distillation loss: differentiable, unweighted scalars, computed in float32.

Frames are `[B, 3, T, H, W]`, nominally in [-1, 1] and not clamped: where the teacher overshoots, so may
the student, and no gradient is lost. The target is always the teacher's output.

Reference: arXiv 2602.19161, section 3.3 (L1, LPIPS, feature, SSIM, L_ce); LeanVAE (wavelet bands). Sharpness, energy
and temporal are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.operators import frames_as_batch
from flashvaed_cli.numerics.accumulation import accumulation_device, plain_arithmetic
from flashvaed_cli.numerics.images import SSIM_WINDOW, gaussian_window, laplacian, luma

Frames = Float[Tensor, "B 3 T H W"]
Scalar = Float[Tensor, ""]
MeanOverRanks = Callable[[Tensor], Tensor]

DATA_RANGE = 2.0
_NUM_PYRAMID_LEVELS = 3
_NUM_ENERGY_OCTAVES = 2
_ENERGY_FLOOR = 1e-6
"""Mean squared Laplacian below which a clip counts as flat; rounding to 8 bits alone gives about 1e-4."""
_R2_DAMPENING_FRAC = 1e-6


@dataclass(frozen=True)
class LossWeights:
    """Weight of every term; 0 switches a term off, and it is not computed.

    Reference: arXiv 2602.19161, section 3.3, for L1, LPIPS, feature, SSIM and L_ce. `l_ce` counts in phase 2 only.
    """

    l1: float = 10.0
    mse: float = 0.0
    lpips: float = 2.0
    feature: float = 1.0
    ssim: float = 5.0
    l_ce: float = 1.0
    sharpness: float = 0.0
    energy: float = 0.0
    temporal: float = 0.0
    wavelet: float = 0.0
    adversarial: float = 0.0


def mse_loss(student: Frames, teacher: Frames) -> Scalar:
    """Mean squared difference: what PSNR measures."""
    return (student - teacher).square().mean()


def l1_loss(student: Frames, teacher: Frames) -> Scalar:
    """Mean absolute difference."""
    return (student - teacher).abs().mean()


def ssim_loss(student: Frames, teacher: Frames) -> Scalar:
    """1 - SSIM of single frames and colour channels, averaged.

    Gaussian window of 11 pixels (sigma 1.5), without padding; smaller frames use the largest
    odd window that fits.
    """
    a, b = frames_as_batch(student), frames_as_batch(teacher)  # [BT, 3, H, W]
    window = min(SSIM_WINDOW, *a.shape[-2:])
    kernel = gaussian_window(window - 1 + window % 2, a)
    # Terms of the teacher alone take no part in the backward pass.
    mean_a, square_a, product = _smooth(torch.stack([a, a * a, a * b]), kernel)
    mean_b, square_b = _smooth(torch.stack([b, b * b]), kernel)
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return 1 - (luminance * structure).mean()


def _smooth(planes: Float[Tensor, "M N 3 H W"], kernel: Float[Tensor, " size"]) -> Float[Tensor, "M N 3 h w"]:
    """Each plane separately, without padding. Planes as channels: as images of a batch, 30 times slower on a CPU."""
    flat = planes.flatten(0, 2)[None]  # [1, M N 3, H, W]
    count = flat.shape[1]
    rows = kernel.expand(count, 1, 1, -1)
    flat = F.conv2d(F.conv2d(flat, rows, groups=count), rows.mT, groups=count)
    return flat[0].unflatten(0, planes.shape[:3])


def sharpness_loss(student: Frames, teacher: Frames) -> Scalar:
    """Mean absolute difference of Laplacian pyramids, averaged over three octaves.

    Unlike L1, it gives the finest detail the same weight as everything coarser. But it is a difference too:
    for this term, detail that the student cannot place is best left out.
    """
    difference = frames_as_batch(student - teacher)  # bands are linear, so those of the difference suffice
    bands = _laplacian_bands(difference)
    return torch.stack([band.abs().mean() for band in bands]).mean() if bands else difference.sum() * 0


def energy_loss(student: Frames, teacher: Frames) -> Scalar:
    """How much less, or more, detail there is: mean absolute logarithm of the ratio of Laplacian energies.

    Per clip, of the luma at full and at half size. Terms that compare pixel by pixel are smallest when unpredictable
    detail is left out, so they soften; this one asks only for the same amount of detail, wherever it lies, and
    so complements them. 0.1 means that the energy is off by a tenth.
    """
    pairs = zip(_detail_energies(student), _detail_energies(teacher), strict=True)
    ratios = [((ours + _ENERGY_FLOOR) / (theirs + _ENERGY_FLOOR)).log().abs() for ours, theirs in pairs]
    return torch.cat(ratios).mean() if ratios else student.sum() * 0


def _detail_energies(frames: Frames) -> list[Float[Tensor, " B"]]:
    """Mean squared Laplacian of the luma of each clip, finest octave first."""
    planes = luma(frames_as_batch(frames))  # [B T, 1, H, W]
    energies = []
    for _ in range(_NUM_ENERGY_OCTAVES):
        if min(planes.shape[-2:]) < 3:
            break
        energies.append(laplacian(planes).square().unflatten(0, (len(frames), -1)).flatten(1).mean(dim=1))
        planes = F.avg_pool2d(planes, 2)
    return energies


def _laplacian_bands(images: Float[Tensor, "N C H W"]) -> list[Tensor]:
    """Finest first, each half the size of the previous one; images of a single row or column have none."""
    bands = []
    for _ in range(_NUM_PYRAMID_LEVELS):
        if min(images.shape[-2:]) < 2:
            break
        coarse = F.avg_pool2d(images, 2, ceil_mode=True, count_include_pad=False)
        bands.append(images - F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False))
        images = coarse
    return bands


def temporal_loss(student: Frames, teacher: Frames) -> Scalar:
    """Mean absolute difference of frame-to-frame changes; 0 for single frames."""
    changes = (student - teacher).diff(dim=2)
    return changes.abs().mean() if changes.numel() else changes.sum()


def wavelet_loss(student: Frames, teacher: Frames) -> Scalar:
    """Mean absolute difference of Haar bands: those with a difference in any direction, plus half of the others.

    Plain sums and differences of two neighbours, in rows and columns for the first frame, in time too for the pairs of
    frames after it; what does not fill a pair is left out. Times 0.4 it is what LeanVAE trains with.
    """
    difference = student - teacher
    first = _haar(_haar([difference[:, :, :1]], 3), 4)
    later = _haar(_haar(_haar([difference[:, :, 1:]], 2), 3), 4)
    low = [bands[0].abs().mean() for bands in (first, later) if bands[0].numel()]
    high = [band.abs().mean() for bands in (first, later) for band in bands[1:] if band.numel()]
    return torch.stack(high).mean() + 0.5 * torch.stack(low).mean() if high else difference.sum() * 0


def _haar(bands: list[Tensor], dim: int) -> list[Tensor]:
    """Sums of pairs along a dimension, then differences, of every band; the lowest band stays first."""
    pairs = [band.narrow(dim, 0, band.shape[dim] // 2 * 2).unflatten(dim, (-1, 2)) for band in bands]
    return [pair.select(dim + 1, 0) + sign * pair.select(dim + 1, 1) for sign in (1, -1) for pair in pairs]


def r2_loss(
    features: Float[Tensor, "B C T H W"], kept: Sequence[int], *, mean_over_ranks: MeanOverRanks | None = None
) -> Scalar:
    """L_ce = 1 - R²: the share of the variance of all channels that the kept ones do not explain linearly.

    R² is that of the least-squares map (with intercept) from the kept channels to all, over the positions
    of this batch. The map is solved without gradient: at the minimum the residual does not change with
    it to first order, so the gradient with respect to the features is exact (up to the tiny ridge)
    and no factorisation is differentiated.

    Args:
        kept: the channels that will be kept.
        mean_over_ranks: the mean of a tensor over all processes. With it the value is that of the batches of all
            of them together, and the mean of their gradients is its gradient.
    Reference:
        arXiv 2602.19161, section 3.3. Departure: ridge of 1e-6 times the mean variance, for dead channels.
    """
    rows = features.movedim(1, -1).flatten(0, -2)  # [N, C]
    mean = rows.mean(dim=0)
    # To first order the covariance does not change with the mean it is taken about, so that needs no gradient.
    centred = rows - (mean if mean_over_ranks is None else mean_over_ranks(mean.detach()))
    covariance = centred.T @ centred / len(rows)
    if mean_over_ranks is not None:  # the value of all ranks, the gradient of this one's share
        covariance = covariance + (mean_over_ranks(covariance.detach()) - covariance.detach())
    covariance = covariance.to(accumulation_device(features.device)).double()  # [C, C]
    chosen = torch.tensor(list(kept), device=covariance.device)
    gram, cross = covariance[chosen][:, chosen], covariance[chosen]  # [K, K], [K, C]
    with plain_arithmetic(covariance.device):
        ridge = _R2_DAMPENING_FRAC * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
        identity = torch.eye(len(chosen), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram.detach() + ridge.detach() * identity, cross.detach())  # [K, C]
    total = covariance.diagonal().sum()
    unexplained = total - 2 * (weight * cross).sum() + (weight * (gram @ weight)).sum()
    return (unexplained / total.clamp_min(torch.finfo(torch.float32).tiny)).to(features)


FRAME_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1_loss,
    "mse": mse_loss,
    "ssim": ssim_loss,
    "sharpness": sharpness_loss,
    "energy": energy_loss,
    "temporal": temporal_loss,
    "wavelet": wavelet_loss,
}


@torch.no_grad()
def clamped_error(student: Frames, teacher: Frames) -> Scalar:
    """Mean squared difference of frames clamped to [-1, 1]: averaged over steps, it gives the PSNR of them all."""
    return (student.clamp(-1, 1) - teacher.clamp(-1, 1)).square().mean()


def psnr_of_error_db(error: float) -> float:
    """PSNR of a mean squared difference, at most 120 dB."""
    return 10 * math.log10(DATA_RANGE**2 / max(error, DATA_RANGE**2 * 1e-12))
