"""How channels depend on one another: the variance that a kept set explains, and the map back to all channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from flashvaed_cli.errors import CalibrationError

NEGLIGIBLE_SHARE = 1e-10
"""A variance below this share of a reference is rounding.

A channel is dead or constant if its variance is that small compared with the largest of all, and explained if its
residual is that small compared with its own variance: the gain ||S[:,j]||² / S[j,j] would divide noise by noise.
"""


class ResidualCovariance:
    """The covariance of what the picked channels leave unexplained, kept up to date by rank-one downdates.

    Args:
        covariance: centred, S.
        metric: positive semi-definite M; `gains` are drops of tr(M S). None: the identity.
    Raises:
        CalibrationError: a matrix is not finite, or no channel varies.
    """

    def __init__(self, covariance: Float64[Tensor, "C C"], metric: Float64[Tensor, "C C"] | None = None) -> None:
        require_covariance(covariance)
        self.matrix = covariance.detach().to(torch.float64, copy=True)
        self.total = float(self.matrix.trace())
        variance = self.matrix.diagonal()
        self.alive: Bool[Tensor, " C"] = variance > NEGLIGIBLE_SHARE * variance.max()
        self._floor = (NEGLIGIBLE_SHARE * variance).clamp(min=torch.finfo(torch.float64).tiny)
        self._metric = metric
        self._weighted = self.matrix if metric is None else self.matrix @ metric  # S M
        # Gains below this are rounding: the metric no longer sees any difference.
        self._least_gain = 0.0 if metric is None else 1e-13 * float(self._weighted.trace())

    @property
    def r2(self) -> float:
        """Share of the variance of all channels that the picked ones explain."""
        left = float(self.matrix.diagonal().clamp(min=0.0).sum()) / self.total
        return min(max(1.0 - left, 0.0), 1.0)

    def variances(self) -> Float64[Tensor, " C"]:
        """Each channel's remaining variance; zero where only rounding remains."""
        variance = self.matrix.diagonal()
        return torch.where(self.alive & (variance > self._floor), variance, 0.0)

    def gains(self) -> Float64[Tensor, " C"]:
        """Drop of tr(M S) by each pick: S[j,:] M S[:,j] / S[j,j]; zero where only rounding remains."""
        variance = self.variances()
        gains = (self._weighted * self.matrix).sum(dim=1) / torch.where(variance > 0, variance, 1.0)
        return torch.where((variance > 0) & (gains > self._least_gain), gains, 0.0)

    def pick(self, channel: int) -> None:
        """Project `channel` out of all others: S <- S - S[:,j] S[:,j]ᵀ / S[j,j]."""
        variance = float(self.variances()[channel])
        if variance > 0:
            column = self.matrix[:, channel].clone()
            self.matrix.addr_(column, column, alpha=-1.0 / variance)
            if self._metric is not None:
                self._weighted.addr_(column, self._metric @ column, alpha=-1.0 / variance)
        self.matrix[channel, :] = 0.0
        self.matrix[:, channel] = 0.0
        self._weighted[channel, :] = 0.0


def r2_of_set(covariance: Float64[Tensor, "C C"], kept: Sequence[int]) -> float:
    """Share of the variance of all channels that least squares from `kept` explains.

    Raises:
        CalibrationError: the covariance is not finite, or no channel varies.
    """
    residual = ResidualCovariance(covariance)
    for channel in kept:
        residual.pick(channel)
    return residual.r2


def reconstruction_map(
    covariance: Float64[Tensor, "C C"], mean: Float64[Tensor, " C"], kept: Sequence[int]
) -> tuple[Float64[Tensor, "C k"], Float64[Tensor, " C"]]:
    """Least-squares map from the kept channels to all: Y ≈ W X + b.

    A kept channel maps to itself exactly. If kept channels depend on one another, the map of
    least norm (in units of each channel's deviation) is used; a dead kept channel contributes nothing to the others.

    Returns:
        W and b, float64.
    Raises:
        CalibrationError: the covariance is not finite, or no channel varies.
    """
    require_covariance(covariance)
    covariance = covariance.detach().double()
    index = torch.as_tensor(list(kept), device=covariance.device)
    if len(set(kept)) != len(kept):
        raise ValueError(f"a channel appears twice: {list(kept)}")
    variance = covariance.diagonal()
    alive = variance[index] > NEGLIGIBLE_SHARE * variance.max()
    scale = torch.where(alive, variance[index], 1.0).rsqrt() * alive  # [k]
    correlation = covariance[index][:, index] * scale[:, None] * scale[None, :]  # [k, k]
    inverse = torch.linalg.pinv(correlation, rtol=NEGLIGIBLE_SHARE, hermitian=True)
    weight = (covariance[:, index] * scale) @ inverse * scale  # [C, k]
    weight[index] = torch.eye(len(kept), dtype=torch.float64, device=covariance.device)
    bias = mean.double() - weight @ mean.double()[index]  # [C]
    bias[index] = 0.0
    return weight, bias


def effective_rank(covariance: Float64[Tensor, "C C"], fraction: float = 0.99) -> int:
    """Number of principal components that hold `fraction` of the variance; 0 when nothing varies."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], not {fraction}")
    _require_finite_square(covariance)
    spectrum = torch.linalg.eigvalsh(covariance.detach().double()).flip(0).clamp(min=0.0)
    if not bool(spectrum[0] > 0):
        return 0
    held = torch.cumsum(spectrum, dim=0)
    # The last sums differ from the total by rounding only, which must not count as a component.
    rounding = 1.0 - len(spectrum) * torch.finfo(torch.float64).eps
    return min(int((held < fraction * rounding * held[-1]).sum()) + 1, len(spectrum))


def nuclear_norm_drops(second_moment: Float64[Tensor, "C C"]) -> Float64[Tensor, " C"]:
    """How much the nuclear norm of a feature matrix X `[C, N]` falls when each of its rows is zeroed.

    From A = XXᵀ/N alone, in units of √N: the norm is tr(A^½), and zeroing row j leaves A without row and column j.
    With A = Q diag(λ) Qᵀ, G(t) = (A + t)⁻¹ and √a = (1/π) ∫ a / (a + t) dt/√t, the trace of the smaller resolvent
    is tr G - (G²)_jj / G_jj, hence

        drop_j = (1/π) ∫ √t [Σ_i Q_ji² λ_i / (λ_i + t)²] / [Σ_i Q_ji² / (λ_i + t)] d(log t).

    One eigendecomposition serves all rows. The trapezoid rule on log t is exact to float64: its error falls as
    exp(-2π²/step), and the integrand falls as √t and 1/√t at the ends.
    """
    values, vectors = torch.linalg.eigh(second_moment)
    largest = float(values[-1])
    # The root of an eigenvalue that is only rounding would be 1e-8 of the largest.
    values = torch.where(values > len(values) * torch.finfo(torch.float64).eps * largest, values, 0.0)
    if not largest > 0:
        return torch.zeros_like(values)
    step = 0.5
    t = torch.arange(-80.0, 80.0, step, dtype=torch.float64, device=values.device).exp()  # in units of λ_max
    shares = vectors.square()  # [j, i]
    ratio = values[:, None] / largest
    resolvent = 1.0 / (ratio + t)  # [i, t]
    integrand = t.sqrt() * (shares @ (ratio * resolvent.square())) / (shares @ resolvent)  # [j, t]
    return integrand.sum(dim=1) * (step / math.pi * math.sqrt(largest))


def require_covariance(covariance: Float64[Tensor, "C C"]) -> None:
    """Refuse a covariance that is no basis for choosing channels.

    Raises:
        CalibrationError: NaN or infinite values, or no channel that varies.
    """
    _require_finite_square(covariance)
    if not bool(covariance.diagonal().max() > 0):
        raise CalibrationError(
            "no channel varies over the calibration clips: check the weights, or calibrate on other clips"
        )


def _require_finite_square(covariance: Float64[Tensor, "C C"]) -> None:
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"a covariance is square, not {tuple(covariance.shape)}")
    if not bool(torch.isfinite(covariance).all()):
        raise CalibrationError("the covariance holds NaN or infinite values: calibrate again on valid clips")
