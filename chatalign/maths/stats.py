"""Intervals for evaluation: how sure a win rate or a mean difference is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_RESAMPLED_NUMBERS_AT_ONCE = 1_000_000


class Interval(NamedTuple):
    """A point estimate with the two ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def wilson_interval(wins: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Win rate in [0, 1] with its Wilson score interval; a tie may be half a win.

    Raises ValueError unless 0 ≤ wins ≤ n, n > 0 and confidence is in (0, 1). Source: Wilson (1927).
    """
    if n <= 0 or not 0 <= wins <= n:
        raise ValueError(f"{wins} wins of {n}; expected 0 <= wins <= n and n > 0")
    _require_share(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, z_squared_over_n = wins / n, z * z / n
    centre = (rate + z_squared_over_n / 2) / (1 + z_squared_over_n)
    half_width = z * math.sqrt((rate * (1 - rate) + z_squared_over_n / 4) / n) / (1 + z_squared_over_n)
    # Clamped: at 0 or n wins, rounding would put an end past it.
    return Interval(rate, max(0.0, centre - half_width), min(1.0, centre + half_width))


def paired_bootstrap(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ours − theirs with its percentile bootstrap interval, prompts resampled, the pair kept together.

    The same arguments give the same interval on any machine. Raises ValueError where the lengths differ, nothing is
    given, or a value is not finite. Source: Efron & Tibshirani (1993), chapter 13.
    """
    our_values, their_values = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if our_values.shape != their_values.shape or our_values.ndim != 1 or our_values.size == 0:
        raise ValueError(f"{our_values.shape} against {their_values.shape}; pass one score a prompt from either side")
    differences = our_values - their_values
    if not np.isfinite(differences).all():
        raise ValueError("a score is not finite; its interval would mean nothing")
    _require_share(confidence)
    random = np.random.default_rng(seed)
    rows_at_once = max(1, _RESAMPLED_NUMBERS_AT_ONCE // differences.size)
    means: list[float] = []
    while len(means) < resamples:
        rows = min(rows_at_once, resamples - len(means))
        chosen = random.integers(differences.size, size=(rows, differences.size))
        means.extend(differences[chosen].mean(axis=1).tolist())
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(differences.mean()), float(low), float(high))


def _require_share(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a share in (0, 1)")
