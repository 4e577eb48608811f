"""Which channels to keep: greedy R² and the rules it is compared with, one function each.

A rule orders the channels of one group by importance, from the evidence about them (`ChannelEvidence`). For every
rule, larger counts give supersets, ties (up to rounding) go to the lowest index, and channels that
do not vary over the calibration clips (dead or constant ones) come after all that do, by index; for `greedy-energy`
only dead ones come last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float64
from torch import Tensor

from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.numerics.independence import NEGLIGIBLE_SHARE, ResidualCovariance, nuclear_norm_drops

_TIE_SHARE = 1e-12


@dataclass(frozen=True)
class ChannelEvidence:
    """The evidence about the channels of one group; a rule raises if it lacks what it needs.

    Attributes:
        covariance: centred, over all calibration positions.
        second_moment: the same about zero, in the same units: covariance + mean meanᵀ.
        producer_l1: sum of the absolute weights of the filters that produce each channel.
        consumer_metric: M such that tr(M E) is the squared error of what the consumers compute, E the covariance of
            the error of their input.
        run: number of neighbouring channels that are picked together: the run with the largest sum of scores wins,
            each score as if the channel were picked alone.
    """

    covariance: Float64[Tensor, "C C"]
    second_moment: Float64[Tensor, "C C"] | None = None
    producer_l1: Float64[Tensor, " C"] | None = None
    consumer_metric: Float64[Tensor, "C C"] | None = None
    run: int = field(default=1, kw_only=True)


@dataclass(frozen=True)
class Selection:
    """Channels in the order in which they were picked, and R² of all channels after each pick."""

    kept: list[int]
    r2: list[float]


class OrdersChannels(Protocol):
    """The signature of every entry of `SELECTION_RULES`.

    Raises CalibrationError when `num_kept` is not in 1 to C, the evidence is not finite or lacks what the rule
    needs, or no channel varies.
    """

    def __call__(self, evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection: ...


def select_greedy_r2(evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection:
    """Keep the channels that together explain most of the total variance, one after another.

    Each pick is the channel with the largest gain in R² = 1 - ||Y - Ŷ||² / ||Y - mean Y||², Ŷ the least-squares
    prediction from the kept channels; exact, O(C²) per pick. Once everything is explained, dependent channels
    follow by index.

    Reference:
        arXiv 2602.19161, section 3.1. Departure: exact gains from the covariance instead of a fit per candidate.
    """
    del seed
    _require_num_kept(evidence, num_kept)
    residual = ResidualCovariance(evidence.covariance)
    return _pick_greedily(residual, num_kept, residual.gains, run=evidence.run)


def select_greedy_energy(evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection:
    """Greedy R² about zero instead of about the mean, so that a channel's mean counts too.

    A norm divides by the root mean square of all channels, so a channel that is large and nearly constant stabilises
    all others; without it they would be normalised by one another. Centred R² cannot see that.

    Reference:
        arXiv 2602.19161, section 3.1. Departure: second moments instead of covariances, no constant in the fit.
    """
    del seed
    _require_num_kept(evidence, num_kept)
    second_moment = _require(
        evidence.second_moment, "greedy-energy", "the means of the channels besides their covariance"
    )
    energy, variance = ResidualCovariance(second_moment), ResidualCovariance(evidence.covariance)
    order = _pick_greedily(energy, num_kept, energy.gains, run=evidence.run).kept
    r2: list[float] = []
    for channel in order:
        variance.pick(channel)
        r2.append(max(variance.r2, r2[-1] if r2 else 0.0))
    return Selection(order, r2)


def select_next_layer(evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection:
    """Keep the channels from which the consumers' outputs can be computed best, one after another.

    Each pick is the channel with the largest drop of tr(M S), M the consumer metric and S the residual covariance:
    S[j,:] M S[:,j] / S[j,j]. With M = I this is greedy R².

    Reference:
        ThiNet, arXiv 1707.06342. Departure: closed form from second moments; the kept channels are mapped by least
        squares; `surgery.evidence` describes how the metric treats norms and taps.
    """
    del seed
    _require_num_kept(evidence, num_kept)
    metric = _require(evidence.consumer_metric, "next-layer", "the weights of the layers that read the channels")
    residual = ResidualCovariance(evidence.covariance, metric)
    if not bool((residual.gains() > 0).any()):
        raise CalibrationError("the rule next-layer cannot choose: no layer that reads these channels depends on them")
    return _pick_greedily(residual, num_kept, residual.gains, run=evidence.run)


def select_pivoted_qr(evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection:
    """Keep the channel with the largest residual variance, one after another: QR with column pivoting.

    Reference:
        LinDeps, arXiv 2507.21573. Departure: centred features, by downdates of the covariance instead of a QR of
        the features, and the count is given instead of a threshold.
    """
    del seed
    _require_num_kept(evidence, num_kept)
    residual = ResidualCovariance(evidence.covariance)
    return _pick_greedily(residual, num_kept, residual.variances, run=evidence.run)


def select_chip(evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection:
    """Keep the channels whose removal would lower the nuclear norm of the feature matrix most, each judged alone.

    Reference:
        CHIP, arXiv 2110.13981. Departure: one feature matrix over all positions of all clips, instead of the mean
        over those of single images.
    """
    del seed
    _require_num_kept(evidence, num_kept)
    second_moment = _require(evidence.second_moment, "chip", "the means of the channels besides their covariance")
    # The root of an eigenvalue that is rounding is 1e-8 of the largest, which must not break ties.
    return _pick_ranked(evidence, nuclear_norm_drops(second_moment), num_kept, tie_share=1e-7)


def select_l1(evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection:
    """Keep the channels whose filters have the largest sum of absolute weights, each judged alone.

    Reference:
        arXiv 1608.08710 (Pruning Filters for Efficient ConvNets). Departure: where several layers write to a
        channel, their sums are added.
    """
    del seed
    _require_num_kept(evidence, num_kept)
    weight_sums = _require(evidence.producer_l1, "l1", "the weights of the layers that produce the channels")
    return _pick_ranked(evidence, weight_sums, num_kept)


def select_variance(evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection:
    """Keep the channels with the largest variance, each judged alone."""
    del seed
    _require_num_kept(evidence, num_kept)
    return _pick_ranked(evidence, evidence.covariance.diagonal(), num_kept)


def select_random(evidence: ChannelEvidence, num_kept: int, *, seed: int = 0) -> Selection:
    """Keep a uniformly random set of the channels that vary, the paper's baseline."""
    _require_num_kept(evidence, num_kept)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(evidence.covariance.shape[0], generator=generator)
    return _pick_ranked(evidence, order.argsort().neg().double().to(evidence.covariance.device), num_kept)


SELECTION_RULES: dict[str, OrdersChannels] = {
    "greedy-r2": select_greedy_r2,
    "greedy-energy": select_greedy_energy,
    "next-layer": select_next_layer,
    "pivoted-qr": select_pivoted_qr,
    "chip": select_chip,
    "l1": select_l1,
    "variance": select_variance,
    "random": select_random,
}


def unvarying_channels(evidence: ChannelEvidence) -> tuple[list[int], list[int]]:
    """The dead channels (no variance, no mean) and the constant ones (no variance, but a mean).

    No variance is one of at most 1e-10 of the largest; no mean is a square below the same figure. Without second
    moments all count as dead.
    """
    variance = evidence.covariance.diagonal()
    floor = NEGLIGIBLE_SHARE * variance.max()
    still = variance <= floor
    power = torch.zeros_like(variance) if evidence.second_moment is None else evidence.second_moment.diagonal()
    dead, constant = still & (power <= floor), still & (power > floor)
    return dead.nonzero().flatten().tolist(), constant.nonzero().flatten().tolist()


def _pick_greedily(
    residual: ResidualCovariance,
    num_kept: int,
    score: Callable[[], Float64[Tensor, " C"]],
    tie_share: float = _TIE_SHARE,
    run: int = 1,
) -> Selection:
    """Repeatedly pick the best by a score of what the picks so far leave; the last run may be cut short."""
    available = torch.ones_like(residual.alive)
    kept, r2 = [], []
    while len(kept) < num_kept:
        if run == 1:
            first = _first_best(score(), residual.alive, available, tie_share)
        else:
            living = residual.alive.unflatten(0, (-1, run))
            sums = score().unflatten(0, (-1, run)).where(living, 0.0).sum(1)
            first = run * _first_best(sums, living.any(1), available[::run], tie_share)
        for channel in range(first, min(first + run, first + num_kept - len(kept))):
            residual.pick(channel)
            available[channel] = False
            kept.append(channel)
            r2.append(max(residual.r2, r2[-1] if r2 else 0.0))
    return Selection(kept, r2)


def _pick_ranked(
    evidence: ChannelEvidence, score: Float64[Tensor, " C"], num_kept: int, tie_share: float = _TIE_SHARE
) -> Selection:
    """Pick the best by a score that each channel has on its own."""
    return _pick_greedily(ResidualCovariance(evidence.covariance), num_kept, lambda: score, tie_share, evidence.run)


def _first_best(score: Float64[Tensor, " C"], alive: Tensor, available: Tensor, tie_share: float) -> int:
    """Lowest index of the best available channel, the same on every machine; dead channels come last."""
    living = alive & available
    if not bool(living.any()):
        return int(available.nonzero()[0, 0])
    best = score[living].max()
    return int((living & (score >= best - tie_share * best.abs())).nonzero()[0, 0])


def _require_num_kept(evidence: ChannelEvidence, num_kept: int) -> None:
    width = evidence.covariance.shape[0]
    if not 1 <= num_kept <= width:
        raise CalibrationError(
            f"cannot keep {num_kept} of {width} channels: choose a ratio that keeps at least one and at most all"
        )


def _require(evidence: Tensor | None, rule: str, what: str) -> Tensor:
    if evidence is None:
        raise CalibrationError(f"the rule {rule} needs {what}, which was not given; choose another rule")
    if not bool(torch.isfinite(evidence).all()):
        raise CalibrationError(f"the rule {rule} needs {what}, and they hold NaN or infinite values")
    return evidence
