"""Confidence intervals for statistics over a few clips, by the percentile bootstrap."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

SampleT = TypeVar("SampleT")

_NUM_RESAMPLES = 2000
_MAX_DRAWS_AT_ONCE = 2_000_000
MIN_SAMPLES = 3
"""With fewer, resampling says nothing about other clips."""


def bootstrap_interval(
    samples: Sequence[SampleT],
    statistic: Callable[[Sequence[SampleT]], float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The percentile interval of a statistic over resampled samples; None for fewer than three.

    Args:
        samples: one per clip; for a comparison of decoders, their values together.
        seed: the same seed gives the same interval.
    Reference: Efron 1979, Bootstrap methods.
    """
    if len(samples) < MIN_SAMPLES:
        return None
    rng = random.Random(seed)
    values = sorted(statistic(rng.choices(samples, k=len(samples))) for _ in range(_NUM_RESAMPLES))
    tail = (1 - confidence) / 2
    return values[round(tail * (_NUM_RESAMPLES - 1))], values[round((1 - tail) * (_NUM_RESAMPLES - 1))]


def bootstrap_mean_interval(
    samples: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """`bootstrap_interval` of the mean, fast for thousands of samples; None for fewer than three.

    To compare two decoders, pass the per-clip differences, so that variation between clips does not widen the
    interval.
    """
    count = len(samples)
    if count < MIN_SAMPLES:
        return None
    rng = np.random.default_rng(seed)
    values, means = np.asarray(samples, dtype=np.float64), []
    step = max(_MAX_DRAWS_AT_ONCE // count, 1)
    for done in range(0, _NUM_RESAMPLES, step):
        size = min(step, _NUM_RESAMPLES - done)
        means.append(values[rng.integers(0, count, size=(size, count))].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
