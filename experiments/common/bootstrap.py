"""Means with bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean, and the middle 95 % of the means of resampled values."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def as_row(self) -> dict[str, float]:
        """Of a scalar, as JSON takes it."""
        return {name: float(value) for name, value in self._asdict().items()}


def bootstrap(values: np.ndarray) -> Interval:
    """Mean over the first axis, with percentile bootstrap intervals.

    Args:
      values: float [run, ...]; runs are resampled whole.

    Returns:
      Three float arrays [...]; the same ones for the same values.
    """
    values = np.asarray(values, float)
    count = len(values)
    # How often each run is drawn, instead of the drawn runs themselves.
    counts = np.random.default_rng(0).multinomial(
        count, np.full(count, 1 / count), RESAMPLES
    )
    means = np.tensordot(counts / count, values, 1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return Interval(values.mean(0), low, high)


def bootstrap_difference(first: np.ndarray, second: np.ndarray) -> Interval:
    """Mean of `first` minus mean of `second`, both float [run], resampled apart."""
    rng = np.random.default_rng(0)
    means = [
        rng.choice(values, (RESAMPLES, len(values))).mean(1)
        for values in (np.asarray(first), np.asarray(second))
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means[0] - means[1], [tail, 1 - tail])
    return Interval(np.mean(first) - np.mean(second), low, high)
