"""The correction for a sampler that isn't the trainer, on distributions small enough to sum over."""

from __future__ import annotations

import math

import pytest
import torch

from chatalign.maths import importance_weights, policy_loss, sampler_excess

P, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])  # trainer's and sampler's, three tokens
ALL = torch.ones(3, dtype=torch.bool)


def test_weights_by_hand() -> None:
    # 0.5 / 0.2, 0.3 / 0.3, 0.2 / 0.5.
    assert importance_weights(P.log(), Q.log(), ALL, cap=3.0).tolist() == pytest.approx([2.5, 1.0, 0.4])
    assert importance_weights(P.log(), Q.log(), ALL, cap=2.0).tolist() == pytest.approx([2.0, 1.0, 0.4])


def test_uncapped_weights_make_the_sampler_unbiased() -> None:
    f = torch.tensor([1.0, -2.0, 5.0])
    weights = importance_weights(P.log(), Q.log(), ALL, cap=math.inf)
    assert float((Q * weights * f).sum()) == pytest.approx(float((P * f).sum()))  # E_q[w f] = E_p[f] = 0.9
    assert float((Q * weights).sum()) == pytest.approx(1.0)
    capped = importance_weights(P.log(), Q.log(), ALL, cap=2.0)
    assert float((Q * capped * f).sum()) == pytest.approx(0.9 - 0.2 * 0.5 * 1.0)  # what the cap of 2 takes off 2.5


def test_the_gradient_is_that_of_the_trainers_distribution() -> None:
    """Summed over the vocabulary with the sampler's probabilities: ∇ E_q[w r A] = ∇ E_p[log π A] at π = p."""
    advantages = torch.tensor([1.0, -2.0, 5.0])
    logits = P.log().clone().requires_grad_()
    logps = logits.log_softmax(-1)
    weights = importance_weights(P.log(), Q.log(), ALL, cap=math.inf)
    loss = policy_loss(
        logps_BT=logps,
        old_logps_BT=P.log(),
        advantages_BT=advantages,
        mask_BT=ALL,
        normaliser=1.0,
        importance_weights_BT=weights * Q,
    ).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    # d/dlogit_j of −Σ p A log π = −p_j (A_j − Σ p A), with Σ p A = 0.9.
    assert gradient.tolist() == pytest.approx([-0.5 * 0.1, 0.3 * 2.9, -0.2 * 4.1], abs=1e-6)


def test_weights_carry_no_gradient_and_are_0_off_the_mask() -> None:
    logps = P.log().clone().requires_grad_()
    weights = importance_weights(logps, Q.log(), torch.tensor([True, False, True]))
    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([2.0, 0.0, 0.4])


def test_excess_is_what_truncation_does_not_explain() -> None:
    logps = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    sampled = torch.tensor([-1.2, -0.9, -0.7, -0.1])
    allowed = torch.tensor([0.1, 0.1, 0.1, math.inf])
    assert sampler_excess(logps, sampled, allowed).tolist() == pytest.approx([0.2, 0.0, 0.2, 0.0], abs=1e-6)
    # Top-p 0.8 keeps 0.5 and 0.3: each is divided by 0.8, which −log(0.8) allows exactly.
    kept = (P[:2] / 0.8).log()
    room = torch.full((2,), -math.log(0.8))
    assert sampler_excess(P[:2].log(), kept, room).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="sampler_logps"):
        importance_weights(P.log(), Q.log()[:2], ALL)
    with pytest.raises(ValueError, match="allowed"):
        sampler_excess(P.log(), Q.log(), torch.zeros(2))
