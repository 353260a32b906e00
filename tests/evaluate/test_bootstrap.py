"""Intervals: they cover what they should, pairing narrows them, one seed gives one answer."""

import math

import numpy as np

from dsv4.evaluate.bootstrap import median, ratio_of_sums

ONES = np.ones(40)


def width(estimate):
    return estimate.high - estimate.low


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        bytes_, rate = rng.integers(2000, 4000, 40), 2 + rng.normal(size=40) * 0.3
        found = ratio_of_sums(rate * bytes_, bytes_, resamples=2000, seed=seed)
        covered.append(found.low <= 2 <= found.high)
        assert found.low < found.value < found.high
    assert 0.88 <= np.mean(covered) <= 0.99


def test_what_is_hard_for_both_cancels():
    rng = np.random.default_rng(1)
    baseline = rng.uniform(500, 3000, 40)
    nats = baseline * (1.01 + 0.002 * rng.normal(size=40))
    paired = ratio_of_sums(nats, baseline)
    apart = ratio_of_sums(nats, ONES * baseline.mean())
    assert abs(paired.value - 1.01) < 0.002 and paired.low > 1
    assert width(paired) < width(apart) / 50 and apart.low < 1


def test_the_seed_decides():
    nats = np.random.default_rng(2).uniform(1, 2, 40)
    assert ratio_of_sums(nats, ONES, seed=3) == ratio_of_sums(nats, ONES, seed=3)
    assert ratio_of_sums(nats, ONES, seed=3) != ratio_of_sums(nats, ONES, seed=4)


def test_the_same_twice_has_no_spread():
    nats = np.random.default_rng(2).uniform(1, 2, 40)
    found = ratio_of_sums(nats, nats)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_one_window_says_nothing_of_spread_and_nothing_nothing_at_all():
    assert ratio_of_sums(np.array([3.0]), np.array([2.0])).facts() == {"value": 1.5, "low": None, "high": None}
    assert math.isnan(ratio_of_sums(ONES, 0 * ONES).value)
    found = ratio_of_sums(np.array([0.0, 3.0]), np.array([0.0, 2.0]))  # resamples that count nothing are left out
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)


def test_the_median():
    found = median(np.array([0, 5, 7, 64, 64]))
    assert found.value == 7 and found.low <= 5 and found.high == 64
