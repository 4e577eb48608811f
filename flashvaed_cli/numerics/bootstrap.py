"""How sure a mean over few clips is: percentile bootstrap."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

SampleT = TypeVar("SampleT")

_NUM_RESAMPLES = 2000
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
        samples: one per clip; of decoders that are compared, their values together.
        seed: same seed, same interval.
    Reference: Efron 1979, Bootstrap methods.
    """
    if len(samples) < MIN_SAMPLES:
        return None
    rng = random.Random(seed)
    values = sorted(statistic(rng.choices(samples, k=len(samples))) for _ in range(_NUM_RESAMPLES))
    tail = (1 - confidence) / 2
    return values[round(tail * (_NUM_RESAMPLES - 1))], values[round((1 - tail) * (_NUM_RESAMPLES - 1))]
