"""Ridge least squares for one layer, from normal equations accumulated clip by clip."""

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

# A feature whose centred energy is below this share of the largest does not vary: the rest is rounding.
_DEAD_SHARE = 1e-12


class NormalEquations:
    """Sums of XᵀX, XᵀY and diag(YᵀY) for the fit Y ≈ X Wᵀ + b; memory O(K² + K O) whatever the data.

    Products and sums are float64. A float32 product is off by about 1e-7, by an amount that depends on the number of
    threads, and a solve with ridge λ amplifies that by up to 1/λ; it amplifies the rounding of the rows by 1/(2√λ).

    The bias is an implicit constant feature: X and Y are held relative to a shift (the means of the
    first update, later the means of all), so that the sums lose nothing by cancellation and
    the bias drops out of the solve without being damped.

    Args:
        num_features: K.
        num_outputs: O.
        label: the layer, for error messages.
    """

    def __init__(self, num_features: int, num_outputs: int, *, label: str = "layer") -> None:
        if num_features < 1 or num_outputs < 1:
            raise ValueError(f"{label}: {num_features} features and {num_outputs} outputs cannot be fitted")
        self.num_features = num_features
        self.num_outputs = num_outputs
        self.label = label
        self.num_rows = 0
        self._allocate(torch.device("cpu"))

    def _allocate(self, device: torch.device) -> None:
        k, o = self.num_features, self.num_outputs
        self._feature_shift: Float64[Tensor, " K"] = torch.zeros(k, dtype=torch.float64, device=device)
        self._target_shift: Float64[Tensor, " O"] = torch.zeros(o, dtype=torch.float64, device=device)
        self._feature_sum: Float64[Tensor, " K"] = torch.zeros(k, dtype=torch.float64, device=device)
        self._target_sum: Float64[Tensor, " O"] = torch.zeros(o, dtype=torch.float64, device=device)
        self._target_energy: Float64[Tensor, " O"] = torch.zeros(o, dtype=torch.float64, device=device)
        self._cross: Float64[Tensor, "K O"] = torch.zeros(k, o, dtype=torch.float64, device=device)
        self._gram: Float64[Tensor, "K K"] = torch.zeros(
            k, k, dtype=torch.float64, device=device
        )  # upper, until centred
        self._is_centred = True

    def update(self, features: Float[Tensor, "N K"], targets: Float[Tensor, "N O"]) -> None:
        """Add N rows.

        Raises:
            CalibrationError: NaN or infinite values.
        """
        if features.shape[1:] != (self.num_features,) or targets.shape[1:] != (self.num_outputs,):
            raise ValueError(
                f"{self.label}: {self.num_features} features and {self.num_outputs} outputs expected, "
                f"got {tuple(features.shape)} and {tuple(targets.shape)}"
            )
        if len(features) != len(targets):
            raise ValueError(f"{self.label}: {len(features)} feature rows but {len(targets)} target rows")
        if len(features) == 0:
            return
        require_finite(features, f"{self.label} (inputs)")
        require_finite(targets, f"{self.label} (targets)")
        with plain_arithmetic(features.device):
            if self.num_rows == 0:
                self._start(features.detach(), targets.detach())
            rows = rows_per_block(self.num_features)
            for x, y in zip(features.detach().split(rows), targets.detach().split(rows), strict=True):
                self._add(x, y)
        self._is_centred = False

    def _start(self, features: Float[Tensor, "N K"], targets: Float[Tensor, "N O"]) -> None:
        device = accumulation_device(features.device)
        if device != self._gram.device:
            self._allocate(device)
        self._feature_shift = features.mean(dim=0, dtype=torch.float32).to(device).double()
        self._target_shift = targets.mean(dim=0, dtype=torch.float32).to(device).double()

    def _add(self, features: Float[Tensor, "N K"], targets: Float[Tensor, "N O"]) -> None:
        x = features.to(self._gram.device).double() - self._feature_shift
        y = targets.to(self._gram.device).double() - self._target_shift
        self._feature_sum += x.sum(dim=0)
        self._target_sum += y.sum(dim=0)
        self._target_energy += y.square().sum(dim=0)
        self._cross += x.T @ y
        add_upper_gram_(self._gram, x)
        self.num_rows += len(features)

    def merge(self, other: NormalEquations) -> None:
        """Add the rows of another set of equations, which keeps its values (though it may be re-centred)."""
        if (other.num_features, other.num_outputs) != (self.num_features, self.num_outputs):
            raise ValueError(f"{self.label}: cannot merge equations of other sizes")
        if other.num_rows == 0:
            return
        device = self._gram.device if self.num_rows else other._gram.device
        with plain_arithmetic(device):
            if self.num_rows == 0:
                self._allocate(device)
                self._feature_shift, self._target_shift = other._feature_shift.clone(), other._target_shift.clone()
            other.centre()
            rows = other.num_rows
            x_step = other._feature_shift.to(device) - self._feature_shift
            y_step = other._target_shift.to(device) - self._target_shift
            self._gram += other._gram.to(device)
            self._cross += other._cross.to(device)
            self._target_energy += other._target_energy.to(device) + rows * y_step.square()
            add_outer_(self._gram, x_step, x_step, rows)
            add_outer_(self._cross, x_step, y_step, rows)
            self._feature_sum += rows * x_step
            self._target_sum += rows * y_step
            self.num_rows += rows
        self._is_centred = False

    def centre(self) -> None:
        """Move the shift to the means and fill the lower triangle, in place. More updates may follow.

        Raises:
            CalibrationError: no rows were accumulated, or a sum overflowed.
        """
        if self.num_rows == 0:
            raise CalibrationError(f"{self.label}: no positions were accumulated; calibrate on at least one clip")
        if self._is_centred:
            return
        with plain_arithmetic(self._gram.device):
            x_step, y_step = self._feature_sum / self.num_rows, self._target_sum / self.num_rows
            add_outer_(self._gram, x_step, x_step, -self.num_rows)
            add_outer_(self._cross, x_step, y_step, -self.num_rows)
            self._target_energy -= self.num_rows * y_step.square()
            self._feature_shift += x_step
            self._target_shift += y_step
            self._feature_sum.zero_()
            self._target_sum.zero_()
            mirror_upper_(self._gram)
            self._gram.diagonal().clamp_(min=0.0)
            self._target_energy.clamp_(min=0.0)
        require_finite(self._gram.diagonal(), f"{self.label} (gram)")
        require_finite(self._target_energy, f"{self.label} (targets' energy)")
        self._is_centred = True

    @property
    def gram(self) -> Float64[Tensor, "K K"]:
        """Centred XᵀX: the accumulator itself, not a copy; do not write to it."""
        self.centre()
        return self._gram

    @property
    def cross(self) -> Float64[Tensor, "K O"]:
        """Centred XᵀY; not a copy."""
        self.centre()
        return self._cross

    @property
    def target_energy(self) -> Float64[Tensor, " O"]:
        """||y - mean y||² of each output."""
        self.centre()
        return self._target_energy

    @property
    def feature_mean(self) -> Float64[Tensor, " K"]:
        """Mean of each feature."""
        self.centre()
        return self._feature_shift

    @property
    def target_mean(self) -> Float64[Tensor, " O"]:
        """Mean of each output."""
        self.centre()
        return self._target_shift


@dataclass(frozen=True)
class RidgeSolution:
    """A solved layer, float64 on the device of the sums.

    `relative_error` is ||XWᵀ + b - Y||² / ||Y - mean Y||² on the rows accumulated.
    If `num_rows` is below `num_unknowns` (K + 1 per output), only the ridge makes the solution unique.
    """

    weight: Float64[Tensor, "O K"]
    bias: Float64[Tensor, " O"]
    relative_error: float
    num_rows: int
    num_unknowns: int


def solve_ridge(
    equations: NormalEquations, *, dampening_frac: float, prior_weight: Float[Tensor, "O K"] | None = None
) -> RidgeSolution:
    """Solve one layer by ridge least squares; the bias is not damped.

    Minimises ||XWᵀ + b - Y||² + λ Σ_k d_k ||w_k - w0_k||², λ = dampening_frac, the gram centred, d its diagonal
    and w0 = `prior_weight` or zero: every feature is damped in units of its own variance, so that the solution does
    not depend on how features are scaled. A feature that does not vary (d below 1e-12 of the largest) is damped
    like the largest, and so keeps its prior. Memory: the gram and one copy of it.

    Args:
        equations: the accumulated sums; still usable afterwards.
        dampening_frac: dimensionless, >= 0.
        prior_weight: the weight to stay close to unless the data say otherwise.
    Raises:
        CalibrationError: the damped gram is not positive definite (too few positions, or dead inputs).
    Reference:
        arXiv 2602.19161, section 3.1. Departure: ridge term, prior and bias, for whole kernels.
    """
    if dampening_frac < 0:
        raise ValueError(f"dampening_frac must be at least 0, not {dampening_frac}")
    gram, right = equations.gram, equations.cross
    with plain_arithmetic(gram.device):
        energy = damping_energy(equations)
        scale = energy.rsqrt()  # [K]
        if prior_weight is not None:
            prior = prior_weight.detach().to(device=gram.device, dtype=torch.float64)
            right = torch.addcmul(right, energy[:, None], prior.T, value=dampening_frac)
        damped = gram * scale
        damped *= scale[:, None]  # unit diagonal, but for features that do not vary
        damped.diagonal().add_(dampening_frac)
        scaled = solve_positive_(damped, right * scale[:, None], equations, dampening_frac)
        weight = (scaled * scale[:, None]).T.contiguous()  # [O, K]
        del damped
        bias = equations.target_mean - weight @ equations.feature_mean
    return RidgeSolution(
        weight=weight,
        bias=bias,
        relative_error=relative_error(equations, weight, bias),
        num_rows=equations.num_rows,
        num_unknowns=equations.num_features + 1,
    )


def damping_energy(equations: NormalEquations) -> Float64[Tensor, " K"]:
    """The d of `solve_ridge`: the gram's diagonal, and its largest value for features that do not vary.

    Raises:
        CalibrationError: none varies.
    """
    energy = equations.gram.diagonal()
    largest = float(energy.max())
    if not largest > 0:
        raise CalibrationError(
            f"{equations.label}: no unique solution: none of its inputs varies over {equations.num_rows} "
            "positions; check the weights before it, or calibrate on other clips"
        )
    return torch.where(energy > _DEAD_SHARE * largest, energy, largest)


def solve_positive_(
    matrix: Float64[Tensor, "K K"],
    right: Float64[Tensor, "K O"],
    equations: NormalEquations,
    dampening_frac: float,
) -> Float64[Tensor, "K O"]:
    """Solve a symmetric system by Cholesky, overwriting `matrix` with its factor.

    Raises:
        CalibrationError: not positive definite to working precision; the message says what `equations` lack.
    """
    size = matrix.shape[0]
    scale = float(matrix.diagonal().max())
    # Symmetric and row-major, so the transpose is the same matrix, column-major: LAPACK works on it in place.
    factor = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    smallest_pivot = float(factor.diagonal().min()) ** 2
    if int(info) != 0 or not smallest_pivot > size * torch.finfo(torch.float64).eps * scale:
        raise CalibrationError(
            f"{equations.label}: the least squares has no unique solution: {equations.num_rows} positions for "
            f"{size + 1} unknowns per output, dampening_frac {dampening_frac:g}. Use more or longer "
            "clips, or a larger dampening_frac."
        )
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def relative_error(equations: NormalEquations, weight: Float[Tensor, "O K"], bias: Float[Tensor, " O"]) -> float:
    """||XWᵀ + b - Y||² / ||Y - mean Y||², from the sums alone; never below 0.

    For outputs that do not vary, see `error_share`.
    """
    gram = equations.gram
    with plain_arithmetic(gram.device):
        weight = weight.detach().to(device=gram.device, dtype=torch.float64)
        bias = bias.detach().to(device=gram.device, dtype=torch.float64)
        fitted = (weight @ gram).mul_(weight).sum() - 2.0 * (weight * equations.cross.T).sum()
        offset = weight @ equations.feature_mean + bias - equations.target_mean  # [O]
        energy = equations.target_energy.sum()
        # The first part is a difference of large sums: rounding may take it below zero.
        error = float((fitted + energy).clamp(min=0.0)) + equations.num_rows * float(offset.square().sum())
    return error_share(equations, error)


def error_share(equations: NormalEquations, error: float) -> float:
    """A summed squared error as a share of ||Y - mean Y||².

    Where no output varies (to 1e-12 of the constants' energy) the share is 0 if the fit meets the
    constants as closely, infinity if not.
    """
    energy = float(equations.target_energy.sum())
    rounding = 1e-12 * equations.num_rows * float(equations.target_mean.square().sum())
    if energy <= rounding:
        return 0.0 if error <= rounding else float("inf")
    return error / energy
