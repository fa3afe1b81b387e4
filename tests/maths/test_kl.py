"""KL estimators: values, bias, and the gradient that each one really has; the controllers."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatalign.maths import AdaptiveKLController, FixedKLController, k1, k2, k3, kl_exact

LOGITS_V = torch.tensor([0.3, -0.5, 1.1])
REF_LOGITS_V = torch.tensor([-0.2, 0.4, 0.6])


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


def exact_gradient(*, reverse: bool = True) -> Tensor:
    logits_V = LOGITS_V.clone().requires_grad_()
    pair = (logits_V, REF_LOGITS_V) if reverse else (REF_LOGITS_V, logits_V)
    return torch.autograd.grad(kl_exact(*pair), logits_V)[0]


def test_values_by_hand() -> None:
    logp, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert k1(logp, ref).item() == pytest.approx(math.log(2))
    assert k2(logp, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(logp, ref).item() == pytest.approx(0.5 - 1 + math.log(2))
    halves_V, quarters_V = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_exact(halves_V, quarters_V).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert k1(logp, logp).item() == k2(logp, logp).item() == k3(logp, logp).item() == 0


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    logp_V, ref_V = LOGITS_V.log_softmax(0), REF_LOGITS_V.log_softmax(0)
    exact = kl_exact(LOGITS_V, REF_LOGITS_V).item()
    for estimator in (k1, k3):
        assert (logp_V.exp() * estimator(logp_V, ref_V)).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (k3(torch.randn(1000), torch.randn(1000)) >= 0).all()


def test_gradient_of_the_expected_estimate_is_that_of_the_exact_kl() -> None:
    # Tokens are drawn from the policy: the expectation moves with it, which REINFORCE accounts for.
    for estimator in (k1, k3):
        logits_V = LOGITS_V.clone().requires_grad_()
        logp_V = logits_V.log_softmax(0)
        expected = (logp_V.exp() * estimator(logp_V, REF_LOGITS_V.log_softmax(0))).sum()
        assert cosine(torch.autograd.grad(expected, logits_V)[0], exact_gradient()) > 0.999


def test_k1_as_a_reward_follows_the_exact_gradient() -> None:
    logits_V = LOGITS_V.clone().requires_grad_()
    logp_V = logits_V.log_softmax(0)
    penalty_V = k1(logp_V, REF_LOGITS_V.log_softmax(0)).detach()
    surrogate = (logp_V.detach().exp() * penalty_V * logp_V).sum()
    assert cosine(torch.autograd.grad(surrogate, logits_V)[0], exact_gradient()) > 0.999


def gradient_as_a_loss(estimator: object) -> Tensor:
    logits_V = LOGITS_V.clone().requires_grad_()
    logp_V = logits_V.log_softmax(0)
    loss = (logp_V.detach().exp() * estimator(logp_V, REF_LOGITS_V.log_softmax(0))).sum()  # type: ignore[operator]
    return torch.autograd.grad(loss, logits_V)[0]


def test_what_each_estimator_minimises_as_a_loss() -> None:
    assert gradient_as_a_loss(k1).abs().max() < 1e-6
    torch.testing.assert_close(gradient_as_a_loss(k2), exact_gradient(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient_as_a_loss(k3), exact_gradient(reverse=False), atol=1e-6, rtol=1e-5)


def test_sampled_k2_gradient_agrees_with_the_exact_one() -> None:
    logits_V = LOGITS_V.clone().requires_grad_()
    tokens_K = torch.multinomial(LOGITS_V.softmax(0), 200_000, True, generator=torch.Generator().manual_seed(0))
    estimates_K = k2(logits_V.log_softmax(0)[tokens_K], REF_LOGITS_V.log_softmax(0)[tokens_K])
    assert cosine(torch.autograd.grad(estimates_K.mean(), logits_V)[0], exact_gradient()) > 0.999


def test_exact_kl_with_impossible_tokens() -> None:
    p_V = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    value = kl_exact(p_V, torch.tensor([0.0, 0.0, 0.0]))
    value.backward()
    assert value.item() == pytest.approx(math.log(1.5))
    assert p_V.grad is not None
    assert p_V.grad.isfinite().all()
    assert kl_exact(torch.zeros(3), p_V.detach()).item() == math.inf
    assert kl_exact(p_V.detach(), p_V.detach()).item() == 0


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=1000)
    controller.update(6.6, n_episodes=100)  # error 0.1
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller.update(600.0, n_episodes=100)  # clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(0.0, n_episodes=100)  # clipped to -0.2
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)
    with pytest.raises(ValueError, match="nan"):
        controller.update(math.nan, n_episodes=1)


def test_controllers_resume_where_they_were() -> None:
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=1000)
    controller.update(9.0, n_episodes=64)
    resumed = AdaptiveKLController(coef=0.1, target=6.0, horizon=1000)
    resumed.load_state_dict(controller.state_dict())
    assert resumed == controller
    fixed = FixedKLController(0.05)
    fixed.update(100.0, 64)
    assert fixed.state_dict() == {"coef": 0.05}
    with pytest.raises(ValueError, match="'coef' alone"):
        fixed.load_state_dict({"beta": 0.1})
    with pytest.raises(ValueError, match="positive"):
        AdaptiveKLController(coef=0.1, target=0, horizon=1)


def test_shapes_that_differ_are_refused() -> None:
    for function in (k1, k2, k3, kl_exact):
        with pytest.raises(ValueError, match="shapes differ"):
            function(torch.zeros(2, 3), torch.zeros(2, 1))
