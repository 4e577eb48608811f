from __future__ import annotations

import random
import statistics

import pytest

from flashvaed_cli.numerics.bootstrap import bootstrap_interval


def test_of_a_mean_it_is_the_normal_interval() -> None:
    rng = random.Random(1)
    samples = [rng.gauss(10, 2) for _ in range(400)]
    interval = bootstrap_interval(samples, statistics.fmean)
    assert interval is not None
    error = 1.96 * statistics.stdev(samples) / 20
    assert interval == pytest.approx((statistics.fmean(samples) - error, statistics.fmean(samples) + error), abs=0.03)


def test_it_covers_what_it_says() -> None:
    rng = random.Random(2)
    hits = 0
    for trial in range(60):
        interval = bootstrap_interval([rng.gauss(0, 1) for _ in range(30)], statistics.fmean, seed=trial)
        assert interval is not None
        hits += interval[0] <= 0 <= interval[1]
    assert 50 <= hits <= 60


def test_two_samples_have_none_and_equal_ones_no_width() -> None:
    assert bootstrap_interval([1.0, 2.0], statistics.fmean) is None
    assert bootstrap_interval([3.0] * 5, statistics.fmean) == (3.0, 3.0)
