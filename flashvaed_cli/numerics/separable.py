"""Depthwise-separable kernels to replace dense ones: closed-form starts and alternating least squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.accumulation import accumulation_device, plain_arithmetic, require_finite, rows_per_block
from flashvaed_cli.numerics.least_squares import NormalEquations, solve_ridge

_CG_TOLERANCE = 1e-3
_CG_MAX_STEPS = 10
_START_RIDGE = 1e-6
_PRECONDITIONER_RIDGE = 1e-5
_CHANNELS_PER_BLOCK = 16


@dataclass(frozen=True)
class SeparableFit:
    """A fitted depthwise-separable layer, float64 on the device of the sums.

    Errors are relative, ||fit - Y||² / ||Y - mean Y||² on the given rows. `start_error` is that of the
    factors passed in, with their own bias if there is one; `error_history` starts with the factors
    that were chosen to start from, at their best bias, and continues with the lowest error so far after
    each iteration. `relative_error` exceeds neither.
    """

    depthwise: Float64[Tensor, "C kt kh kw"]
    pointwise: Float64[Tensor, "O C"]
    bias: Float64[Tensor, " O"]
    relative_error: float
    start_error: float
    error_history: tuple[float, ...]


def separable_from_dense(
    weight: Float[Tensor, "O C kt kh kw"],
) -> tuple[Float64[Tensor, "C kt kh kw"], Float64[Tensor, "O C"]]:
    """Best separable approximation of a dense kernel for white inputs: rank one per input channel, by SVD.

    Each factor carries half of the scale, and the largest tap of each depthwise kernel is positive.

    Returns:
        depthwise and pointwise, float64; their product is pointwise[o, c] * depthwise[c, t, h, w].
    """
    num_channels, num_taps = weight.shape[1], weight.shape[2:].numel()
    white = torch.eye(num_taps, dtype=torch.float64, device=weight.device).expand(num_channels, -1, -1)
    return separable_start(weight, white)


def separable_start(
    weight: Float[Tensor, "O C kt kh kw"], patch_grams: Float64[Tensor, "C taps taps"]
) -> tuple[Float64[Tensor, "C kt kh kw"], Float64[Tensor, "O C"]]:
    """Best separable approximation of a dense kernel for inputs of known second moments within each channel.

    Minimises ||(W_c - p_c d_cᵀ) G_c^½||² for each input channel c alone: rank one in the metric of the
    data. A ridge of 1e-6 of its mean diagonal makes each G_c definite; a channel that never varies
    counts as white. With every G_c = I this is `separable_from_dense`.

    Args:
        weight: the dense kernel.
        patch_grams: G_c, the (centred) gram of the taps that channel c's kernel reads.
    Returns:
        depthwise and pointwise, float64, scale and sign as in `separable_from_dense`.
    """
    kernels = weight.detach().to(patch_grams).flatten(2).transpose(0, 1)  # [C, O, taps]
    scale, basis = torch.linalg.eigh(patch_grams)  # [C, taps], [C, taps, taps]
    scale = scale.clamp(min=0.0)
    scale = scale + _START_RIDGE * scale.mean(dim=1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0).sqrt()
    root = basis * scale[:, None, :]
    # The leading right singular vector, from the small taps x taps gram: 20 times faster than a batched SVD.
    leading = torch.linalg.eigh(root.mT @ (kernels.mT @ kernels) @ root).eigenvectors[:, :, -1]  # [C, taps]
    pointwise = (kernels @ (root @ leading[:, :, None]))[:, :, 0].T  # [O, C]
    depthwise = (basis @ (leading / scale)[:, :, None])[:, :, 0]  # [C, taps]
    peak = depthwise.gather(1, depthwise.abs().argmax(dim=1, keepdim=True))  # [C, 1]
    sign = torch.where(peak < 0, -1.0, 1.0).to(depthwise)
    depthwise, pointwise = _balance(depthwise * sign, pointwise * sign.T)
    return depthwise.unflatten(1, weight.shape[2:]), pointwise


def frame_from_causal(weight: Float[Tensor, "O C kt kh kw"]) -> Float[Tensor, "O C kh kw"]:
    """The per-frame kernel that equals a causal 3D one on static video: the sum over its temporal taps.

    Exact where all kt frames that the kernel sees are the same (so not on the first kt - 1 frames,
    which see zeros).
    """
    return weight.sum(dim=2)


def fit_separable(
    patches: Float[Tensor, "C N taps"],
    targets: Float[Tensor, "N O"],
    depthwise0: Float[Tensor, "C kt kh kw"],
    pointwise0: Float[Tensor, "O C"],
    *,
    num_iterations: int,
    dampening_frac: float,
    bias0: Float[Tensor, " O"] | None = None,
    dense_weight: Float[Tensor, "O C kt kh kw"] | None = None,
    label: str = "layer",
) -> SeparableFit:
    """Fit depthwise + pointwise + bias to sampled positions by alternating least squares.

    Each iteration improves the depthwise by a few conjugate-gradient steps with the pointwise fixed,
    then solves the pointwise weight and the bias exactly; a pointwise solve comes before the first.
    Both are damped towards the current value, not towards zero: this stabilises directions that the
    data leave open and never raises the error. The ridge is `dampening_frac` times the mean
    diagonal of the step's gram, with every depthwise channel at unit output variance in the pointwise
    step and each channel's own diagonal in the depthwise one, so that no channel's scale matters.
    Matrix-free: reads the patches twice per conjugate-gradient step; beyond them it holds a few
    arrays of N x (C + O).

    Args:
        patches: what the depthwise kernel of each channel reads at N positions, contiguous. They are
            centred IN PLACE, not copied, so the caller must not reuse them. float64 patches keep float64 products.
        targets: the layer's outputs at the same positions; left unchanged.
        depthwise0: start, usually from `separable_from_dense`; a channel whose two factors are both zero stays so.
        pointwise0: start.
        num_iterations: at least 0; 0 fits pointwise and bias alone.
        dampening_frac: dimensionless, > 0.
        bias0: the start's bias, for `start_error` alone; without it that takes the best bias.
        dense_weight: the kernel that the layer replaces. The fit then starts from its `separable_start`
            in the metric of these patches, if the first pointwise solve leaves less error there.
        label: the layer, for error messages.
    Raises:
        CalibrationError: NaN or infinite values, fewer than C + 1 rows, or a pointwise step that is not
            positive definite (no input varies).
    """
    if num_iterations < 0 or not dampening_frac > 0:
        raise ValueError(f"num_iterations {num_iterations} must be >= 0 and dampening_frac {dampening_frac} > 0")
    for values in (depthwise0, pointwise0, bias0, dense_weight):
        if values is not None:
            require_finite(values, f"{label} (weights to start from)")
    problem = _SeparableProblem(patches, targets, dampening_frac, label)
    with plain_arithmetic(patches.device):
        starts = [problem.evaluate(depthwise0.detach(), pointwise0.detach())]
        start_error = problem.share(starts[0], None if bias0 is None else bias0.detach())
        if dense_weight is not None:
            starts.append(problem.evaluate(*separable_start(dense_weight, problem.grams)))
        solved = [problem.solve_pointwise(start.depthwise, start.pointwise) for start in starts]
        start, current = min(zip(starts, solved, strict=True), key=lambda pair: pair[1].squared_error)
        best, history = min(*starts, current, key=_squared_error), [problem.share(start)]
        for _ in range(num_iterations):
            current = problem.solve_pointwise(problem.solve_depthwise(current), current.pointwise)
            # In exact arithmetic the last is the best; in float32 a converged fit jitters.
            best = min(best, current, key=_squared_error)
            history.append(problem.share(best))
        depthwise, pointwise = _balance(best.depthwise, best.pointwise)
        kernel = depthwise.view(depthwise0.shape)
        return SeparableFit(kernel, pointwise, problem.bias(best), problem.share(best), start_error, tuple(history))


@dataclass(frozen=True, eq=False)
class _Factors:
    """A separable map of centred rows with its best bias, and the squared error summed over rows."""

    depthwise: Float64[Tensor, "C taps"]
    pointwise: Float64[Tensor, "O C"]
    bias: Float64[Tensor, " O"]
    squared_error: float


_squared_error = attrgetter("squared_error")


class _SeparableProblem:
    """The two half-problems of a separable fit over sampled rows.

    X_c [N, taps] are the centred patches of channel c, Z [C, N] the depthwise outputs, P [O, C] the
    pointwise weight. Products over rows are formed in the dtype and on the device of the patches;
    weights and what is summed over rows are float64.
    """

    def __init__(
        self, patches: Float[Tensor, "C N taps"], targets: Float[Tensor, "N O"], dampening_frac: float, label: str
    ) -> None:
        _require_rows(patches, targets, label)
        self.patches, self.dampening_frac, self.label = patches.detach(), dampening_frac, label
        self.num_rows = patches.shape[1]
        self.device = accumulation_device(patches.device)
        with plain_arithmetic(patches.device):
            self.patch_mean = _centre_patches_(self.patches).to(self.device)  # [C, taps]
            targets = targets.detach().to(self.patches)
            target_mean = targets.mean(dim=0)  # [O]
            self.targets = targets - target_mean  # [N, O]
            self.target_mean = self._summed(target_mean)
            self.target_energy = float(self._summed(self.targets).square().sum())
            gram = torch.zeros((), dtype=torch.float64, device=self.device)
            for x in self._row_blocks():
                gram = gram + self._summed(torch.bmm(x.mT, x))
            self.grams = gram  # [C, taps, taps]
        require_finite(self.grams, f"{label} (gram)")

    def evaluate(self, depthwise: Float[Tensor, "C ..."], pointwise: Float[Tensor, "O C"]) -> _Factors:
        """Two factors with their best bias and its error."""
        depthwise, pointwise = depthwise.flatten(1).to(self.grams), pointwise.to(self.grams)
        return self._evaluate(self._outputs(depthwise), depthwise, pointwise)

    def bias(self, factors: _Factors) -> Float64[Tensor, " O"]:
        """Their best bias for uncentred rows."""
        offset = (factors.depthwise * self.patch_mean).sum(dim=1)  # [C]
        return self.target_mean + factors.bias - factors.pointwise @ offset

    def share(self, factors: _Factors, bias: Float[Tensor, " O"] | None = None) -> float:
        """Relative error, with another bias if one is given.

        Where no output varies (to 1e-12 of the constants' energy) it is 0 if the fit meets the
        constants as closely, infinity if not.
        """
        error = factors.squared_error
        if bias is not None:
            error += self.num_rows * float((bias.to(self.grams) - self.bias(factors)).square().sum())
        rounding = 1e-12 * self.num_rows * float(self.target_mean.square().sum())
        if self.target_energy <= rounding:
            return 0.0 if error <= rounding else float("inf")
        return error / self.target_energy

    def solve_pointwise(self, depthwise: Float64[Tensor, "C taps"], pointwise: Float64[Tensor, "O C"]) -> _Factors:
        """Exact step for pointwise and bias: the correction that the residual asks for, damped towards none.

        Returns the depthwise channels at unit output variance, the pointwise ones scaled against them.
        """
        outputs = self._outputs(depthwise)
        spread = self._summed(outputs.std(dim=1, correction=0))  # [C]
        scale = torch.where(spread > 0, spread, 1.0)
        outputs = outputs / scale.to(outputs)[:, None]
        depthwise, pointwise = depthwise / scale[:, None], pointwise * scale
        residual, _ = self._residual(outputs, pointwise)
        equations = NormalEquations(*pointwise.shape[::-1], label=self.label)
        equations.update(outputs.T, residual)
        correction = solve_ridge(equations, dampening_frac=self.dampening_frac)
        return self._evaluate(outputs, depthwise, pointwise + correction.weight)

    def solve_depthwise(self, factors: _Factors) -> Float64[Tensor, "C taps"]:
        """A few steps of conjugate gradients on X_cᵀ (PᵀP X d)_c + λ_c d_c, block-Jacobi, from the current value.

        Every step lowers the damped error, so stopping early is safe.
        """
        pointwise = factors.pointwise
        coupling = pointwise.T @ pointwise  # [C, C]
        residual, _ = self._residual(self._outputs(factors.depthwise), pointwise)
        right = self._gather(self._like_rows(pointwise.T) @ residual.T)  # [C, taps]
        blocks = self.grams * coupling.diagonal()[:, None, None]  # [C, taps, taps]
        mean = blocks.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)  # [C, 1]
        mean = torch.where(mean > 0, mean, 1.0)  # a dead channel: nothing acts on it
        ridge = self.dampening_frac * mean
        # Float32 sums may leave a gram slightly indefinite; the preconditioner need not be exact.
        blocks.diagonal(dim1=1, dim2=2).add_(mean * max(self.dampening_frac, _PRECONDITIONER_RIDGE))
        factor = torch.linalg.cholesky(blocks)

        def apply(step: Tensor) -> Tensor:
            return self._gather(self._like_rows(coupling) @ self._outputs(step)) + ridge * step

        def precondition(step: Tensor) -> Tensor:
            return torch.cholesky_solve(step[:, :, None], factor)[:, :, 0]

        return factors.depthwise + _conjugate_gradients(apply, precondition, right)

    def _evaluate(
        self, outputs: Float[Tensor, "C N"], depthwise: Float64[Tensor, "C taps"], pointwise: Float64[Tensor, "O C"]
    ) -> _Factors:
        residual, offset = self._residual(outputs, pointwise)
        return _Factors(depthwise, pointwise, offset, float(self._summed(residual).square().sum()))

    def _residual(
        self, outputs: Float[Tensor, "C N"], pointwise: Float64[Tensor, "O C"]
    ) -> tuple[Float[Tensor, "N O"], Float64[Tensor, " O"]]:
        """Y - Zᵀ Pᵀ, centred, and its mean: the best bias for centred rows."""
        residual = torch.addmm(self.targets, outputs.T, self._like_rows(pointwise.T), alpha=-1.0)
        offset = residual.mean(dim=0)
        return residual.sub_(offset), self._summed(offset)

    def _outputs(self, depthwise: Float64[Tensor, "C taps"]) -> Float[Tensor, "C N"]:
        # One row times a matrix: with a column on the right the batched product is five times slower on the CPU.
        return torch.bmm(self._like_rows(depthwise)[:, None, :], self.patches.mT)[:, 0, :]

    def _gather(self, signal: Float[Tensor, "C N"]) -> Float64[Tensor, "C taps"]:
        """X_cᵀ s_c for every channel."""
        return self._summed(torch.bmm(signal[:, None, :], self.patches)[:, 0, :])

    def _row_blocks(self) -> tuple[Float[Tensor, "C N taps"], ...]:
        return self.patches.split(rows_per_block(self.patches.shape[2]), dim=1)

    def _like_rows(self, weight: Float64[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        return weight.to(self.patches)

    def _summed(self, sums: Float[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        return sums.to(self.device).double()


def _require_rows(patches: Float[Tensor, "C N taps"], targets: Float[Tensor, "N O"], label: str) -> None:
    num_channels, num_rows, _ = patches.shape
    if patches.dtype not in (torch.float32, torch.float64) or not patches.is_contiguous():
        raise ValueError(f"{label}: patches must be contiguous float32 or float64, not {patches.dtype}")
    if len(targets) != num_rows:
        raise ValueError(f"{label}: {num_rows} rows of patches but {len(targets)} of targets")
    if num_rows == 0:
        raise CalibrationError(f"{label}: no positions were sampled; calibrate on at least one clip")
    if num_rows < num_channels + 1:
        raise CalibrationError(
            f"{label}: {num_rows} positions for the {num_channels + 1} unknowns per output of a separable layer's "
            "pointwise convolution. Use more or larger clips (--num-calibration-clips, --crop-size, --num-frames)."
        )
    require_finite(patches, f"{label} (inputs)")
    require_finite(targets, f"{label} (targets)")


def _centre_patches_(patches: Float[Tensor, "C N taps"]) -> Float[Tensor, "C taps"]:
    """Subtract each tap's mean in place and return it as subtracted.

    Channels are processed in small groups: a float64 mean of all would copy everything.
    """
    means = []
    with torch.inference_mode():  # for patches that were made in inference mode themselves
        for block in patches.split(_CHANNELS_PER_BLOCK):
            precision = block.dtype if block.device.type == "mps" else torch.float64
            mean = block.mean(dim=1, keepdim=True, dtype=precision).to(block.dtype)
            block.sub_(mean)
            means.append(mean[:, 0])
        return torch.cat(means)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    right: Float64[Tensor, "C taps"],
    *,
    max_steps: int = _CG_MAX_STEPS,
    tolerance: float = _CG_TOLERANCE,
) -> Float64[Tensor, "C taps"]:
    """Solve A x = right from x = 0, down to `tolerance` times the first (preconditioned) residual."""
    solution = torch.zeros_like(right)
    residual, direction, power, goal = right, right, 0.0, 0.0
    for count in range(max_steps):
        scaled = precondition(residual)
        power, previous = float((residual * scaled).sum()), power
        goal = goal if count else tolerance**2 * power
        if power <= goal:
            break
        direction = scaled + (power / previous) * direction if count else scaled
        image = apply(direction)
        length = power / float((direction * image).sum())
        solution += length * direction
        residual = residual - length * image
    return solution


def _balance(
    depthwise: Float64[Tensor, "C taps"], pointwise: Float64[Tensor, "O C"]
) -> tuple[Float64[Tensor, "C taps"], Float64[Tensor, "O C"]]:
    """Give both factors of each channel the same norm, keeping the product; a zero factor is left alone."""
    depthwise_norm, pointwise_norm = depthwise.norm(dim=1), pointwise.norm(dim=0)  # [C]
    usable = (depthwise_norm > 0) & (pointwise_norm > 0)
    ratio = torch.where(usable, pointwise_norm / depthwise_norm, 1.0).sqrt()
    return depthwise * ratio[:, None], pointwise / ratio
