"""Wilson's interval and the paired bootstrap."""

import numpy as np
import pytest

from chatalign.maths import paired_bootstrap, wilson_interval


def test_wilson_by_hand() -> None:
    # 8 of 10 at z = 1.96: (0.8 + 0.19207) / 1.38415 -+ 1.96 sqrt(0.016 + 0.0096036) / 1.38415
    interval = wilson_interval(8, 10)
    assert interval.estimate == 0.8
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)


def test_wilson_at_the_ends_and_mirrored() -> None:
    assert wilson_interval(0, 20).low == pytest.approx(0, abs=1e-12)
    assert wilson_interval(20, 20).high == pytest.approx(1, abs=1e-12)
    assert wilson_interval(0, 20).high > 0.1
    assert wilson_interval(3, 20).low == pytest.approx(1 - wilson_interval(17, 20).high)
    assert wilson_interval(10.5, 20).estimate == 0.525
    assert wilson_interval(80, 100, confidence=0.9).low > wilson_interval(80, 100, confidence=0.99).low


def test_wilson_covers_the_true_rate_as_often_as_it_says() -> None:
    wins = np.random.default_rng(0).binomial(50, 0.3, size=2000)
    covered = np.mean([wilson_interval(int(w), 50).low <= 0.3 <= wilson_interval(int(w), 50).high for w in wins])
    assert 0.93 < covered < 0.975


def test_bootstrap_agrees_with_the_normal_interval_and_keeps_pairs() -> None:
    random = np.random.default_rng(1)
    prompt_difficulty = random.normal(0, 10, size=200)
    ours, theirs = (
        prompt_difficulty + random.normal(0.5, 1, size=200),
        prompt_difficulty + random.normal(0, 1, size=200),
    )
    interval = paired_bootstrap(ours.tolist(), theirs.tolist(), resamples=2000)
    difference = ours - theirs
    half_width = 1.96 * difference.std(ddof=1) / np.sqrt(200)
    assert interval.estimate == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(difference.mean() - half_width, abs=0.05)
    assert interval.high == pytest.approx(difference.mean() + half_width, abs=0.05)


def test_bootstrap_is_repeatable_and_degenerate_where_nothing_varies() -> None:
    ours, theirs = [1.0, 2.0, 5.0], [0.0, 2.0, 1.0]
    assert paired_bootstrap(ours, theirs, seed=3) == paired_bootstrap(ours, theirs, seed=3)
    assert paired_bootstrap([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0, 1.0)


def test_senseless_arguments_are_refused() -> None:
    for wins, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="expected 0"):
            wilson_interval(wins, n)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=95)
    with pytest.raises(ValueError, match="one score a prompt"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        paired_bootstrap([float("nan")], [1.0])
