"""The covariance of a layer's channels, accumulated clip by clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.accumulation import (
    accumulation_device,
    add_outer_,
    add_upper_gram_,
    mirror_upper_,
    plain_arithmetic,
    require_finite,
    rows_per_block,
)


@dataclass(frozen=True)
class TensorStatistics:
    """Second-order statistics of one tensor's channels over all calibration positions."""

    covariance: Float64[Tensor, "C C"]
    mean: Float64[Tensor, " C"]
    count: int


class CovarianceAccumulator:
    """Count, sum and XXᵀ of C channels over all positions of all clips seen.

    Values are shifted by a provisional mean, taken from the first batch, so that channels far from zero lose no
    precision by cancellation. Products and sums are float64. Memory is O(C²) whatever the data.

    Args:
        width: C.
        label: what is measured, for error messages.
    """

    def __init__(self, width: int, *, label: str = "activations") -> None:
        if width < 1:
            raise ValueError(f"{label}: width must be at least 1, not {width}")
        self.width = width
        self.label = label
        self.count = 0
        self._shift: Float64[Tensor, " C"] = torch.zeros(width, dtype=torch.float64)
        self._sum: Float64[Tensor, " C"] = torch.zeros(width, dtype=torch.float64)
        self._gram: Float64[Tensor, "C C"] = torch.zeros(width, width, dtype=torch.float64)  # upper triangle only

    def update(self, x: Float[Tensor, "B C *positions"]) -> None:
        """Add a batch; every batch element and position is one observation.

        Raises:
            CalibrationError: NaN or infinite values, or another number of channels.
        """
        if x.ndim < 2 or x.shape[1] != self.width:
            raise CalibrationError(f"{self.label}: {self.width} channels expected, got a tensor {tuple(x.shape)}")
        if x.numel() == 0:
            return
        require_finite(x, self.label)
        with plain_arithmetic(x.device):
            columns = x.detach().flatten(2) if x.ndim > 2 else x.detach()[:, :, None]  # [B, C, P]
            if self.count == 0:
                self._start(columns)
            for sample in columns:  # [C, P]
                self._add(sample)

    def _start(self, columns: Float[Tensor, "B C P"]) -> None:
        device = accumulation_device(columns.device)
        dtype = torch.float64 if columns.dtype == torch.float64 else torch.float32
        self._shift = columns.mean(dim=(0, 2), dtype=dtype).to(device).double()
        self._sum = torch.zeros(self.width, dtype=torch.float64, device=device)
        self._gram = torch.zeros(self.width, self.width, dtype=torch.float64, device=device)

    def _add(self, sample: Float[Tensor, "C P"]) -> None:
        for block in sample.split(rows_per_block(self.width), dim=1):
            centred = block.to(self._gram.device).double() - self._shift[:, None]  # [C, N]
            self._sum += centred.sum(dim=1)
            add_upper_gram_(self._gram, centred.T)
        self.count += sample.shape[1]

    def merge(self, other: CovarianceAccumulator) -> None:
        """Add everything that another accumulator has seen; the other stays unchanged."""
        if other.width != self.width:
            raise ValueError(f"{self.label}: cannot merge {other.width} channels into {self.width}")
        if other.count == 0:
            return
        with plain_arithmetic(other._gram.device):
            if self.count == 0:
                self._shift, self._sum, self._gram = other._shift.clone(), other._sum.clone(), other._gram.clone()
                self.count = other.count
                return
            device = self._gram.device
            gram, total = other._gram.to(device, copy=True), other._sum.to(device)
            step = other._shift.to(device) - self._shift
            add_outer_(gram, total, step, 1.0)
            add_outer_(gram, step, total + other.count * step, 1.0)
            self._gram += gram
            self._sum += total + other.count * step
            self.count += other.count

    @property
    def mean(self) -> Float64[Tensor, " C"]:
        """Mean of each channel."""
        self._require_positions()
        return self._shift + self._sum / self.count

    def covariance(self) -> Float64[Tensor, "C C"]:
        """Population covariance (divided by the count).

        Raises:
            CalibrationError: nothing was accumulated, or a sum overflowed.
        """
        self._require_positions()
        with plain_arithmetic(self._gram.device):
            covariance = self._gram / self.count
            offset = self._sum / self.count
            add_outer_(covariance, offset, offset, -1.0)
            mirror_upper_(covariance)
            covariance.diagonal().clamp_(min=0.0)
        require_finite(covariance, f"{self.label} (covariance)")
        return covariance

    def _require_positions(self) -> None:
        if self.count == 0:
            raise CalibrationError(f"{self.label}: no positions were accumulated; calibrate on at least one clip")
