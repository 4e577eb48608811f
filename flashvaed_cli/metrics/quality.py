"""How close a decoder's frames come to a reference, chunk by chunk.

Pixels are in [-1, 1]. All figures are built from per-frame values, so a long video needs memory for
one chunk and one frame. Definitions:

    PSNR: 10 log10(4 / MSE), the mean squared error taken over every value of the clip (all frames
        weigh the same), not a mean of per-frame decibels. Identical clips give infinity;
        `PSNR_CAP_DB` is what a report writes instead.
    SSIM: Gaussian window, 11 wide, sigma 1.5, frames mapped to [0, 1], mean over frames.
    LPIPS: mean over frames, lower is better.
    Sharpness ratio: mean squared Laplacian of the luma, output / reference. Below 1: softer.
    Flicker: mean |(y[t] - y[t-1]) - (r[t] - r[t-1])|, the error of the temporal differences.
    Flicker at borders: the same where t is the first frame of a latent frame, where chunks can meet.
    First and worst frame: PSNR of that frame alone. A mean over clips takes the worst of all.
    MS-SSIM: five scales, frames mapped to [0, 1], mean over frames of at least 161 x 161.
    Delta E: CIEDE2000, mean and 95th percentile; see `colour`.

Reference: Wang et al. 2004, Image quality assessment (SSIM); Wang, Simoncelli and Bovik 2003, Multiscale structural
similarity; Zhang et al. 2018, arXiv 1801.03924 (LPIPS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.metrics.colour import ColourShift
from flashvaed_cli.metrics.structure import MS_SSIM_MIN_SIDE, ms_ssim_per_frame, ssim_per_frame
from flashvaed_cli.numerics.images import SSIM_WINDOW, laplacian, luma

PSNR_CAP_DB = 100.0
PIXEL_RANGE = 2.0  # from -1 to 1
FRAMES_PER_PASS = 4
PIXELS_PER_PASS = 4 * 480 * 832  # with the above it bounds the temporaries of SSIM, LPIPS and Delta E

FrameMetric = Callable[[Tensor, Tensor], Tensor]
"""Output and reference frames `[N, 3, H, W]` in [-1, 1] to one value per frame, `[N]`."""


@dataclass(frozen=True)
class QualityResult:
    """Figures of one clip (or their mean over clips); None where a figure is not defined.

    `ssim` needs frames of at least 11 x 11, `ms_ssim` 161 x 161, `lpips` its backbone, `sharpness_ratio` 3 x 3 and a
    reference that is not flat, `flicker` two frames, `vmaf` an ffmpeg that has it.
    """

    psnr_db: float
    ssim: float | None
    lpips: float | None
    sharpness_ratio: float | None
    flicker: float | None
    num_frames: int
    border_flicker: float | None = None
    first_frame_psnr_db: float | None = None
    worst_frame_psnr_db: float | None = None
    ms_ssim: float | None = None
    delta_e: float | None = None
    delta_e_95: float | None = None
    vmaf: float | None = None


class _RunningMean:
    """Mean of values that arrive in pieces; None until the first."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.detach().cpu().double().sum())  # MPS has no float64
        self.count += values.numel()

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


class QualityAccumulator:
    """Compares one clip, or a batch of clips of one size, chunk after chunk.

    Values are clamped to [-1, 1] first, so that what is compared is what a video file would show.
    """

    def __init__(
        self,
        *,
        lpips: FrameMetric | None = None,
        lpips_min_side: int = 0,
        thorough: bool = False,
        frames_per_latent: int = 1,
    ) -> None:
        """Start empty.

        Args:
            lpips: see `load_lpips`; None leaves LPIPS out.
            lpips_min_side: smallest frame side that `lpips` can take; smaller frames are left out.
            thorough: also MS-SSIM and Delta E, which take longer than everything else together.
            frames_per_latent: frames of every latent frame but the first, which is one frame.
        """
        self._frames_per_latent = frames_per_latent
        self._num_seen = 0
        self._first_error: float | None = None
        self._worst_error = 0.0
        self._border_flicker = _RunningMean()
        self._ms_ssim = _RunningMean()
        self._colour = ColourShift() if thorough else None
        self._lpips_metric = lpips
        self._lpips_min_side = lpips_min_side
        self._squared_error = _RunningMean()
        self._ssim = _RunningMean()
        self._lpips = _RunningMean()
        self._output_energy = _RunningMean()
        self._reference_energy = _RunningMean()
        self._flicker = _RunningMean()
        self._last_error: Tensor | None = None  # [B, C, H, W], error of the chunk's last frame

    @torch.no_grad()
    def update(self, output: Float[Tensor, "*B C T H W"], reference: Float[Tensor, "*B C T H W"]) -> None:
        """Add the next frames. Chunks must come in order and without overlap.

        Args:
            output: the decoder's frames.
            reference: ground truth, or another decoder's frames. Moved to the output's device.
        """
        output = _as_batch(output).float().clamp(-1, 1)  # [B, C, T, H, W]
        reference = _as_batch(reference).to(output.device).float().clamp(-1, 1)
        _check_same_shape(output, reference)
        error = output - reference
        self._add_flicker(error)
        self._add_frames(error)
        for y, r in _frame_passes(output, reference):  # [N, C, H, W]
            self._squared_error.add((y - r).square().mean(dim=(1, 2, 3)))
            height, width = y.shape[-2:]
            if min(height, width) >= SSIM_WINDOW:
                self._ssim.add(ssim_per_frame(y, r))
            if self._colour is not None:
                self._colour.add(y, r)
                if min(height, width) >= MS_SSIM_MIN_SIDE:
                    self._ms_ssim.add(ms_ssim_per_frame(y, r))
            if self._lpips_metric is not None and min(height, width) >= self._lpips_min_side:
                self._lpips.add(self._lpips_metric(y, r))
            if min(height, width) >= 3:
                self._output_energy.add(_laplacian_energy_per_frame(y))
                self._reference_energy.add(_laplacian_energy_per_frame(r))

    def _add_flicker(self, error: Float[Tensor, "B C T H W"]) -> None:
        # (y[t] - y[t-1]) - (r[t] - r[t-1]) is a difference of errors, so one frame of error is all that must be kept
        if self._last_error is not None:
            error = torch.cat([self._last_error.unsqueeze(2), error], dim=2)
        if error.shape[2] > 1:
            change = error.diff(dim=2).abs().mean(dim=(1, 3, 4))  # [B, T]
            self._flicker.add(change)
            first = self._num_seen if self._last_error is not None else 1  # number of the frame that changed first
            numbers = torch.arange(first, first + change.shape[1], device=change.device)
            if self._frames_per_latent > 1:
                self._border_flicker.add(change[:, (numbers - 1) % self._frames_per_latent == 0])
        self._last_error = error[:, :, -1].clone()  # a view would keep the whole chunk alive

    def _add_frames(self, error: Float[Tensor, "B C T H W"]) -> None:
        per_frame = error.square().mean(dim=(0, 1, 3, 4)).tolist()
        if per_frame and self._first_error is None:
            self._first_error = per_frame[0]
        self._worst_error = max([*per_frame, self._worst_error], key=_nan_is_largest)
        self._num_seen += len(per_frame)

    def result(self) -> QualityResult:
        """The figures over all frames so far.

        Raises:
            ValueError: no frames have been added.
        """
        mse = self._squared_error.mean
        if mse is None:
            raise ValueError("no frames were compared: call update first")
        return QualityResult(
            psnr_db=_psnr_from_mse(mse),
            ssim=self._ssim.mean,
            lpips=self._lpips.mean,
            sharpness_ratio=_ratio(self._output_energy.mean, self._reference_energy.mean),
            flicker=self._flicker.mean,
            num_frames=self._squared_error.count,
            border_flicker=self._border_flicker.mean,
            first_frame_psnr_db=None if self._first_error is None else _psnr_from_mse(self._first_error),
            worst_frame_psnr_db=_psnr_from_mse(self._worst_error),
            ms_ssim=self._ms_ssim.mean,
            delta_e=None if self._colour is None else self._colour.mean,
            delta_e_95=None if self._colour is None else self._colour.percentile_95,
        )


def compare_frames(
    output: Float[Tensor, "*B C T H W"],
    reference: Float[Tensor, "*B C T H W"],
    *,
    lpips: FrameMetric | None = None,
    lpips_min_side: int = 0,
    thorough: bool = False,
    frames_per_latent: int = 1,
) -> QualityResult:
    """All figures of a clip that is in memory as a whole. See `QualityAccumulator`."""
    accumulator = QualityAccumulator(
        lpips=lpips, lpips_min_side=lpips_min_side, thorough=thorough, frames_per_latent=frames_per_latent
    )
    accumulator.update(output, reference)
    return accumulator.result()


def mean_quality(results: Sequence[QualityResult]) -> QualityResult:
    """Mean over clips, each with the same weight; `num_frames` is their sum, the worst frame the worst of all.

    Decibels are averaged directly, identical clips counting as `PSNR_CAP_DB`. A figure that some clips
    lack is averaged over those that have it.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("the mean over no clips is not defined")
    means: dict[str, Any] = {}
    for name in (field.name for field in fields(QualityResult) if field.name != "num_frames"):
        values = [capped(name, value) for result in results if (value := getattr(result, name)) is not None]
        if name == "worst_frame_psnr_db":
            means[name] = min(values, default=None)
        else:
            means[name] = math.fsum(values) / len(values) if values else None
    return QualityResult(num_frames=sum(result.num_frames for result in results), **means)


def capped(name: str, value: float) -> float:
    """A figure with infinite decibels (identical frames) replaced by `PSNR_CAP_DB`; a NaN stays visible."""
    return PSNR_CAP_DB if name.endswith("psnr_db") and value > PSNR_CAP_DB else value


def psnr_db(output: Float[Tensor, "*B C T H W"], reference: Float[Tensor, "*B C T H W"]) -> float:
    """Peak signal-to-noise ratio over the whole clip, data range 2; infinity when identical. Not clamped."""
    _check_same_shape(output, reference)
    mse = _RunningMean()
    for y, r in _frame_passes(_as_batch(output).float(), _as_batch(reference).float()):
        mse.add((y - r).square().mean(dim=(1, 2, 3)))
    if mse.mean is None:
        raise ValueError("a clip without frames has no PSNR")
    return _psnr_from_mse(mse.mean)


def ssim(output: Float[Tensor, "*B C T H W"], reference: Float[Tensor, "*B C T H W"]) -> float | None:
    """Structural similarity, mean over frames; None for frames smaller than the 11 x 11 window."""
    _check_same_shape(output, reference)
    if min(output.shape[-2:]) < SSIM_WINDOW:
        return None
    mean = _RunningMean()
    for y, r in _frame_passes(_as_batch(output).float(), _as_batch(reference).float()):
        mean.add(ssim_per_frame(y, r))
    return mean.mean


def laplacian_energy(frames: Float[Tensor, "*B C T H W"]) -> float | None:
    """Mean squared 4-neighbour Laplacian of the BT.709 luma, borders left out; None below 3 x 3."""
    if min(frames.shape[-2:]) < 3:
        return None
    batch = _as_batch(frames).float()
    mean = _RunningMean()
    for y, _ in _frame_passes(batch, batch):
        mean.add(_laplacian_energy_per_frame(y))
    return mean.mean


def sharpness_ratio(output: Float[Tensor, "*B C T H W"], reference: Float[Tensor, "*B C T H W"]) -> float | None:
    """Laplacian energy of the output divided by the reference's; None when the reference is flat."""
    _check_same_shape(output, reference)
    return _ratio(laplacian_energy(output), laplacian_energy(reference))


def flicker(output: Float[Tensor, "*B C T H W"], reference: Float[Tensor, "*B C T H W"]) -> float | None:
    """Mean absolute error of the frame-to-frame differences; None for one frame."""
    _check_same_shape(output, reference)
    if output.shape[-3] < 2:
        return None
    error = _as_batch(output).float() - _as_batch(reference).float()  # [B, C, T, H, W]
    return float(error.diff(dim=2).abs().mean(dim=(1, 3, 4)).cpu().double().mean())


def _as_batch(frames: Tensor) -> Tensor:
    if frames.ndim not in (4, 5):
        raise ValueError(f"frames are [C, T, H, W] or [B, C, T, H, W], not {tuple(frames.shape)}")
    return frames if frames.ndim == 5 else frames.unsqueeze(0)


def _check_same_shape(output: Tensor, reference: Tensor) -> None:
    if output.shape != reference.shape:
        raise ValueError(f"output {tuple(output.shape)} and reference {tuple(reference.shape)} differ in shape")


def _frame_passes(output: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames of both `[B, C, T, H, W]`, a few at a time as `[N, C, H, W]`."""
    flat_output = output.transpose(1, 2).flatten(0, 1)  # [B*T, C, H, W]
    flat_reference = reference.transpose(1, 2).flatten(0, 1)  # [B*T, C, H, W]
    pixels = max(output.shape[-2] * output.shape[-1], 1)
    step = min(max(PIXELS_PER_PASS // pixels, 1), FRAMES_PER_PASS)
    yield from zip(flat_output.split(step), flat_reference.split(step), strict=True)


def _nan_is_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _laplacian_energy_per_frame(frames: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    return laplacian(luma(frames)).square().mean(dim=(1, 2, 3))


def _psnr_from_mse(mse: float) -> float:
    return math.inf if mse == 0 else 10 * math.log10(PIXEL_RANGE**2 / mse)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
