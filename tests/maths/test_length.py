"""What a reward model's rankings owe to length, on two pairs by hand."""

from __future__ import annotations

import pytest
import torch

from chatalign.maths.length import length_bias


def test_two_pairs_by_hand() -> None:
    found = length_bias(torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([5, 2, 3, 4]))
    assert (found.longer, found.longer_accuracy) == (1, 1.0)
    assert (found.shorter, found.shorter_accuracy) == (1, 0.0)
    assert found.length_gap == 1.0  # (3 − 1) / 2
    assert found.score_length_correlation == pytest.approx(0.6)  # 3 / (√5 · √5)
    assert found.bias == 1.0


def test_ties_are_half_right_and_what_cannot_be_said_is_not() -> None:
    found = length_bias(torch.tensor([1.0, 1.0]), torch.tensor([2, 1]))
    assert (found.longer, found.longer_accuracy) == (1, 0.5)
    assert (found.shorter, found.shorter_accuracy, found.bias, found.score_length_correlation) == (0, None, None, None)
