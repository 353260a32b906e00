"""Confidence intervals by resampling windows or prompts.

Every measure is a ratio of sums over windows: nats over bytes, agreements over tokens. A measure relative to the
baseline is the ratio of both models' nats over the SAME resampled windows, so that windows hard for both cancel: that
is the paired bootstrap, and its intervals are much narrower than the two models' own.

Windows count as independent draws. Neighbouring ones of one work are not quite: intervals speak of text like this
text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A measured value and the ends of its 95 % interval; the ends are NaN where one window says nothing of spread.

    The value is NaN where nothing was counted.
    """

    value: float
    low: float
    high: float

    def facts(self) -> dict[str, float | None]:
        """As JSON has it: null for NaN."""
        return {name: None if math.isnan(x := getattr(self, name)) else float(x) for name in ("value", "low", "high")}


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray, *, resamples: int = 4000, seed: int = 0) -> Estimate:
    """sum(numerator) / sum(denominator), both [windows], percentile interval over resampled windows."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if not denominator.sum():
        return Estimate(math.nan, math.nan, math.nan)
    drawn = _draw(len(numerator), resamples, seed)
    over, under = numerator[drawn].sum(axis=1), denominator[drawn].sum(axis=1)
    value = numerator.sum() / denominator.sum()
    return _interval(float(value), over[under > 0] / under[under > 0], len(numerator))


def median(values: np.ndarray, *, resamples: int = 4000, seed: int = 0) -> Estimate:
    """The median of values [n], percentile interval over resampled values."""
    values = np.asarray(values, np.float64)
    drawn = values[_draw(len(values), resamples, seed)]
    return _interval(float(np.median(values)), np.median(drawn, axis=1), len(values))


def _draw(count: int, resamples: int, seed: int) -> np.ndarray:
    """Which windows each resample takes, int [resamples, count]; the same for all measures of one seed."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def _interval(value: float, resampled: np.ndarray, count: int) -> Estimate:
    if count < 2:
        return Estimate(value, math.nan, math.nan)
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
