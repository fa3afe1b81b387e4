"""Pure comparisons of scores: win rates with intervals, gains, means. Higher scores are better throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatalign.maths.stats import paired_bootstrap, wilson_interval

INTERVALS = (
    "95 %; win rates: Wilson's score interval, a tie being half a win (ties make it wider than need be); "
    "gold_gain and means: percentile bootstrap over prompts, 10,000 resamples, pairs kept together"
)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, list[float]]:
    """Share of prompts on which our score is higher, ties ½, and its Wilson interval [low, high].

    Raises ValueError where the two differ in length or are empty.
    """
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True))
    interval = wilson_interval(wins, len(ours))
    return interval.estimate, [interval.low, interval.high]


def gain(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, list[float]]:
    """Mean of ours − theirs prompt by prompt, and its bootstrap interval [low, high]."""
    interval = paired_bootstrap(ours, theirs)
    return interval.estimate, [interval.low, interval.high]


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each key that every row has as a number; none without rows."""
    keys = [key for key, value in (rows[0] if rows else {}).items() if isinstance(value, int | float)]
    return {
        key: sum(float(row[key]) for row in rows) / len(rows)
        for key in keys
        if all(isinstance(row.get(key), int | float) for row in rows)
    }


def accuracy_of(margins: Sequence[float]) -> float:
    """Share of margins (score of chosen − score of rejected) above 0, exact ties ½."""
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins)
