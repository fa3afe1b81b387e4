"""The Bradley–Terry loss, accuracy, the missing-stop penalty and the score normaliser."""

import json
import math

import numpy as np
import pytest
import torch

from chatalign.maths import ScoreNormaliser, bradley_terry_loss, pairwise_accuracy, penalise_missing_stop


def test_values_by_hand() -> None:
    zero_B, log3_B = torch.zeros(1), torch.tensor([math.log(3)])
    assert bradley_terry_loss(zero_B, zero_B).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(log3_B, zero_B).item() == pytest.approx(math.log(4 / 3))
    assert bradley_terry_loss(log3_B, zero_B, margin_B=log3_B).item() == pytest.approx(math.log(2))
    centred = bradley_terry_loss(torch.ones(1), torch.ones(1), center_coef=0.01)
    assert centred.item() == pytest.approx(math.log(2) + 0.04)


def test_only_the_difference_counts_unless_centred() -> None:
    chosen_B, rejected_B = torch.randn(8), torch.randn(8)
    shifted = bradley_terry_loss(chosen_B + 5, rejected_B + 5)
    torch.testing.assert_close(shifted, bradley_terry_loss(chosen_B, rejected_B), atol=1e-5, rtol=1e-5)
    assert bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == 1000


def test_accuracy_counts_a_tie_as_wrong() -> None:
    assert pairwise_accuracy(torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 4.0])).item() == 0.5


def test_missing_stop() -> None:
    score_B, ended_B = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    assert penalise_missing_stop(score_B, ended_B, 1.5).tolist() == [1.0, -0.5]
    with pytest.raises(ValueError, match="negative"):
        penalise_missing_stop(score_B, ended_B, -1.0)


def test_normaliser_is_the_same_however_the_scores_arrive() -> None:
    scores_B = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    whole, parts = ScoreNormaliser(), ScoreNormaliser()
    whole.update(scores_B)
    for part_B in scores_B.split(7):
        parts.update(part_B)
    parts.update(scores_B[:0])
    exact = scores_B.double().numpy()
    for normaliser in (whole, parts):
        assert normaliser.mean == pytest.approx(exact.mean(), rel=1e-12)
        assert normaliser.std == pytest.approx(exact.std(), rel=1e-9)
    np.testing.assert_allclose(whole.normalise(scores_B), (exact - exact.mean()) / exact.std(), atol=1e-3)


def test_normaliser_through_json() -> None:
    fitted = ScoreNormaliser()
    fitted.update(torch.tensor([1.0, 2.0, 4.0]))
    restored = ScoreNormaliser()
    restored.load_state_dict(json.loads(json.dumps(fitted.state_dict())))
    assert restored == fitted
    with pytest.raises(ValueError, match="keys"):
        restored.load_state_dict({"mean": 0.0})


def test_normaliser_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="after 0 scores"):
        ScoreNormaliser().normalise(torch.zeros(1))
    constant = ScoreNormaliser()
    constant.update(torch.ones(5))
    with pytest.raises(ValueError, match="varied"):
        constant.normalise(torch.zeros(1))
    with pytest.raises(ValueError, match="not finite"):
        constant.update(torch.tensor([math.nan]))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="margin"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), margin_B=torch.zeros(1))
