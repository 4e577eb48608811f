"""Which channels to keep: greedy R², its baselines, and the least-squares map back to all channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float64
from torch import Tensor

from flashvaed_cli.errors import CalibrationError

# A channel whose residual variance is below this share of its own variance counts as explained:
# what is left is rounding, and the gain ||S[:,j]||² / S[j,j] would divide noise by noise.
_EXPLAINED_SHARE = 1e-10


@dataclass(frozen=True)
class GreedySelection:
    """Channels in the order in which they were picked, and R² of all channels after each pick."""

    kept: list[int]
    r2: list[float]


class SelectionRule(Protocol):
    """The call that every entry of `SELECTION_RULES` answers to."""

    def __call__(self, covariance: Float64[Tensor, "C C"], num_kept: int, *, seed: int = 0) -> GreedySelection: ...


class _Residual:
    """The covariance of what the picked channels leave unexplained, kept up to date by rank-one downdates."""

    def __init__(self, covariance: Float64[Tensor, "C C"]) -> None:
        _require_covariance(covariance)
        self.matrix = covariance.detach().to(torch.float64, copy=True)
        self.total = float(self.matrix.trace())
        variance = self.matrix.diagonal()
        self.alive = variance > _EXPLAINED_SHARE * variance.max()
        self.floor = (_EXPLAINED_SHARE * variance).clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def r2(self) -> float:
        left = float(self.matrix.diagonal().clamp(min=0.0).sum()) / self.total
        return min(max(1.0 - left, 0.0), 1.0)

    def gains(self) -> Float64[Tensor, " C"]:
        """Drop of the residual trace by each pick: ||S[:,j]||² / S[j,j]; zero where only rounding is left."""
        variance = self.matrix.diagonal()
        informative = self.alive & (variance > self.floor)
        gains = self.matrix.square().sum(dim=0) / torch.where(informative, variance, 1.0)
        return torch.where(informative, gains, 0.0)

    def pick(self, channel: int) -> None:
        """Project `channel` out of all others: S <- S - S[:,j] S[:,j]ᵀ / S[j,j]."""
        variance = float(self.matrix[channel, channel])
        if bool(self.alive[channel]) and variance > float(self.floor[channel]):
            column = self.matrix[:, channel].clone()
            self.matrix.addr_(column, column, alpha=-1.0 / variance)
        self.matrix[channel, :] = 0.0
        self.matrix[:, channel] = 0.0


def select_greedy_r2(covariance: Float64[Tensor, "C C"], num_kept: int, *, seed: int = 0) -> GreedySelection:
    """Keep the channels that together explain most of the variance of all, one after another.

    Each pick is the channel with the largest gain in R² = 1 - ||Y - Ŷ||² / ||Y - mean Y||², Ŷ the
    least-squares prediction from the kept channels; exact, O(C²) per pick. Ties go to the lowest
    index. Once everything is explained, dependent channels follow by index, and dead channels
    (variance below 1e-10 of the largest) come last of all.

    Args:
        covariance: centred, over all calibration positions.
        num_kept: how many to keep, 1 to C.
        seed: unused; the rule is deterministic.
    Raises:
        CalibrationError: `num_kept` is out of range, the covariance is not finite, or no channel varies.
    Reference:
        arXiv 2602.19161, section 3.1. Departure: exact gains from the covariance instead of a fit per candidate.
    """
    del seed
    residual = _Residual(covariance)
    _require_num_kept(covariance, num_kept)
    available = torch.ones_like(residual.alive)
    kept, r2 = [], []
    for _ in range(num_kept):
        # Gains are >= 0: the offset puts dead channels behind all live ones, and picked ones out of reach.
        score = torch.where(residual.alive, residual.gains(), -1.0)
        channel = _first_argmax(torch.where(available, score, -2.0))
        residual.pick(channel)
        available[channel] = False
        kept.append(channel)
        r2.append(max(residual.r2, r2[-1] if r2 else 0.0))
    return GreedySelection(kept, r2)


def select_random(covariance: Float64[Tensor, "C C"], num_kept: int, *, seed: int = 0) -> GreedySelection:
    """A uniformly random set, the paper's baseline; the same seed gives nested sets for growing `num_kept`."""
    _require_num_kept(covariance, num_kept)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(covariance.shape[0], generator=generator)[:num_kept]
    return _in_order(covariance, order.tolist())


def select_variance(covariance: Float64[Tensor, "C C"], num_kept: int, *, seed: int = 0) -> GreedySelection:
    """The channels with the largest variance, each judged by itself; ties go to the lowest index."""
    del seed
    _require_num_kept(covariance, num_kept)
    order = torch.sort(covariance.diagonal(), descending=True, stable=True).indices[:num_kept]
    return _in_order(covariance, order.tolist())


SELECTION_RULES: dict[str, SelectionRule] = {
    "greedy-r2": select_greedy_r2,
    "random": select_random,
    "variance": select_variance,
}


def r2_of_set(covariance: Float64[Tensor, "C C"], kept: Sequence[int]) -> float:
    """Share of the variance of all channels that least squares from `kept` explains.

    Raises:
        CalibrationError: the covariance is not finite, or no channel varies.
    """
    residual = _Residual(covariance)
    for channel in kept:
        residual.pick(channel)
    return residual.r2


def reconstruction_map(
    covariance: Float64[Tensor, "C C"], mean: Float64[Tensor, " C"], kept: Sequence[int]
) -> tuple[Float64[Tensor, "C k"], Float64[Tensor, " C"]]:
    """Least-squares map from the kept channels to all: Y ≈ W X + b.

    A kept channel maps to itself exactly. Where kept channels depend on one another, the map of
    least norm (in units of each channel's deviation) is taken; a dead kept channel helps no other.

    Returns:
        W and b, float64.
    Raises:
        CalibrationError: the covariance is not finite, or no channel varies.
    """
    _require_covariance(covariance)
    covariance = covariance.detach().double()
    index = torch.as_tensor(list(kept), device=covariance.device)
    if len(set(kept)) != len(kept):
        raise ValueError(f"a channel is kept twice: {list(kept)}")
    variance = covariance.diagonal()
    alive = variance[index] > _EXPLAINED_SHARE * variance.max()
    scale = torch.where(alive, variance[index], 1.0).rsqrt() * alive  # [k]
    correlation = covariance[index][:, index] * scale[:, None] * scale[None, :]  # [k, k]
    inverse = torch.linalg.pinv(correlation, rtol=_EXPLAINED_SHARE, hermitian=True)
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


def _in_order(covariance: Float64[Tensor, "C C"], order: list[int]) -> GreedySelection:
    residual = _Residual(covariance)
    r2: list[float] = []
    for channel in order:
        residual.pick(channel)
        r2.append(max(residual.r2, r2[-1] if r2 else 0.0))
    return GreedySelection(order, r2)


def _first_argmax(score: Float64[Tensor, " C"]) -> int:
    """Lowest index of the maximum; scores equal up to rounding are a tie, on every machine the same."""
    best = float(score.max())
    return int((score >= best - 1e-12 * abs(best)).nonzero()[0, 0])


def _require_num_kept(covariance: Float64[Tensor, "C C"], num_kept: int) -> None:
    if not 1 <= num_kept <= covariance.shape[0]:
        raise CalibrationError(
            f"cannot keep {num_kept} of {covariance.shape[0]} channels: choose a ratio that keeps at least one and "
            "at most all"
        )


def _require_finite_square(covariance: Float64[Tensor, "C C"]) -> None:
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"a covariance is square, not {tuple(covariance.shape)}")
    if not bool(torch.isfinite(covariance).all()):
        raise CalibrationError("the covariance holds NaN or infinite values: calibrate again on valid clips")


def _require_covariance(covariance: Float64[Tensor, "C C"]) -> None:
    _require_finite_square(covariance)
    if not bool(covariance.diagonal().max() > 0):
        raise CalibrationError(
            "no channel varies over the calibration clips: check the weights, or calibrate on other clips"
        )
