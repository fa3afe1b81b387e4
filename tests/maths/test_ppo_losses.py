"""PPO's policy and value losses: values by hand, a NumPy oracle, masks, splits."""

import math

import numpy as np
import pytest
import torch

from chatalign.maths import entropy_bonus, explained_variance, importance_weights, policy_loss, value_loss

B, T = 4, 6


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old_logps_BT = -torch.rand(B, T, generator=generator)
    return {
        "logps_BT": old_logps_BT + 0.3 * torch.randn(B, T, generator=generator),
        "old_logps_BT": old_logps_BT,
        "advantages_BT": torch.randn(B, T, generator=generator),
        "mask_BT": torch.arange(T) < torch.tensor([6, 1, 3, 4])[:, None],
    }


def value_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    old_values_BT = torch.randn(B, T, generator=generator)
    return {
        "values_BT": old_values_BT + 0.3 * torch.randn(B, T, generator=generator),
        "old_values_BT": old_values_BT,
        "returns_BT": torch.randn(B, T, generator=generator),
        "mask_BT": batch()["mask_BT"],
    }


def test_before_any_update_the_ratio_is_one() -> None:
    inputs = batch() | {"logps_BT": batch()["old_logps_BT"]}
    stats = policy_loss(**inputs)
    assert stats.loss.item() == pytest.approx(-inputs["advantages_BT"][inputs["mask_BT"]].mean().item())
    assert (stats.approxkl.item(), stats.clipfrac.item()) == (0, 0)
    assert (stats.ratio_mean.item(), stats.ratio_var.item()) == (1, 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(1.5, 1.0, -1.2, 1), (0.5, 1.0, -0.5, 0), (0.5, -1.0, 0.8, 1), (1.5, -1.0, 1.5, 0), (1.1, 1.0, -1.1, 0)],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, clipped: float) -> None:
    one = torch.ones(1)
    logps_K = torch.tensor([math.log(ratio)], requires_grad=True)
    stats = policy_loss(logps_BT=logps_K, old_logps_BT=0 * one, advantages_BT=advantage * one, mask_BT=one)
    assert stats.loss.item() == pytest.approx(loss)
    assert stats.clipfrac.item() == clipped
    stats.loss.backward()
    assert logps_K.grad is not None
    assert (logps_K.grad.item() == 0) == bool(clipped)


def test_policy_loss_against_numpy() -> None:
    inputs = batch()
    stats = policy_loss(**inputs, clip_range=0.1, clip_range_high=0.3)
    keep = inputs["mask_BT"].numpy()
    new, old, adv = (inputs[k].double().numpy()[keep] for k in ("logps_BT", "old_logps_BT", "advantages_BT"))
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 0.9, 1.3)
    assert stats.loss.item() == pytest.approx(-np.minimum(ratio * adv, clipped * adv).mean(), abs=1e-6)
    assert stats.clipfrac.item() == pytest.approx((clipped * adv < ratio * adv).mean(), abs=1e-6)
    assert stats.approxkl.item() == pytest.approx((ratio - 1 - np.log(ratio)).mean(), abs=1e-6)
    assert stats.ratio_mean.item() == pytest.approx(ratio.mean(), abs=1e-6)
    assert stats.ratio_var.item() == pytest.approx(ratio.var(), abs=1e-6)


@pytest.mark.parametrize("garbage", [1e6, float("inf"), float("nan")])
def test_noise_off_the_mask_changes_no_loss_statistic_or_gradient(garbage: float) -> None:
    for function, inputs, learned in ((policy_loss, batch(), "logps_BT"), (value_loss, value_batch(), "values_BT")):
        off_BT = ~inputs["mask_BT"]
        if function is policy_loss:
            inputs["importance_weights_BT"] = torch.ones(B, T)
        noisy = {k: v if k == "mask_BT" else v.masked_fill(off_BT, garbage) for k, v in inputs.items()}
        inputs[learned].requires_grad_()
        noisy[learned].requires_grad_()
        clean_stats, noisy_stats = function(**inputs), function(**noisy)  # type: ignore[operator]
        assert all(torch.equal(a, b) for a, b in zip(clean_stats, noisy_stats, strict=True))
        clean_grad = torch.autograd.grad(clean_stats.loss, inputs[learned])[0]
        assert torch.equal(torch.autograd.grad(noisy_stats.loss, noisy[learned])[0], clean_grad)
        assert (clean_grad[off_BT] == 0).all()


def test_losses_of_the_parts_add_up_to_that_of_the_whole() -> None:
    for function, inputs in ((policy_loss, batch()), (value_loss, value_batch())):
        tokens = inputs["mask_BT"].sum()
        parts = [function(**{k: v[r] for k, v in inputs.items()}, normaliser=tokens).loss for r in ([0], [1, 2, 3])]  # type: ignore[operator]
        torch.testing.assert_close(sum(parts), function(**inputs).loss)  # type: ignore[operator]


def test_only_the_new_log_probabilities_receive_a_gradient() -> None:
    inputs = batch()
    for name in ("logps_BT", "old_logps_BT", "advantages_BT"):
        inputs[name].requires_grad_()
    policy_loss(**inputs).loss.backward()
    assert inputs["logps_BT"].grad is not None
    assert inputs["old_logps_BT"].grad is inputs["advantages_BT"].grad is None


def test_value_loss_by_hand() -> None:
    # New value 1.0 moved from 0.0 by more than 0.2: the clipped value is 0.2.
    one = torch.ones(1)
    far = value_loss(values_BT=one, old_values_BT=0 * one, returns_BT=one, mask_BT=one)
    assert far.loss.item() == pytest.approx(0.5 * 0.8**2)
    assert far.clipfrac.item() == 1
    free = value_loss(values_BT=one, old_values_BT=0 * one, returns_BT=one, mask_BT=one, clip_range=None)
    assert (free.loss.item(), free.clipfrac.item()) == (0, 0)


def test_value_loss_against_numpy() -> None:
    inputs = value_batch()
    stats = value_loss(**inputs, clip_range=0.1)
    keep = inputs["mask_BT"].numpy()
    new, old, ret = (inputs[k].double().numpy()[keep] for k in ("values_BT", "old_values_BT", "returns_BT"))
    clipped = np.clip(new, old - 0.1, old + 0.1)
    errors, clipped_errors = (new - ret) ** 2, (clipped - ret) ** 2
    assert stats.loss.item() == pytest.approx(0.5 * np.maximum(errors, clipped_errors).mean(), abs=1e-6)
    assert stats.clipfrac.item() == pytest.approx((clipped_errors > errors).mean(), abs=1e-6)


def test_explained_variance() -> None:
    returns_K, mask_K = torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor([1, 1, 1, 0])
    assert explained_variance(returns_K, returns_K, mask_K).item() == 1
    assert explained_variance(returns_K + 5, returns_K, mask_K).item() == pytest.approx(1)
    assert explained_variance(torch.zeros(4), returns_K, mask_K).item() == pytest.approx(0)
    assert explained_variance(-returns_K, returns_K, mask_K).item() == pytest.approx(-3)
    assert explained_variance(returns_K, torch.ones(4), mask_K).isnan()


def test_entropy_bonus_and_importance_weights() -> None:
    entropy_K, mask_K = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])
    assert entropy_bonus(entropy_K, mask_K, coef=0.1).item() == pytest.approx(-0.2)
    logps_K = torch.tensor([math.log(0.5), 0.0, 0.0])
    weights_K = importance_weights(logps_K, torch.tensor([0.0, -5.0, 0.0]), mask_K, cap=2.0)
    assert weights_K.tolist() == pytest.approx([0.5, 2.0, 0.0])
    inputs = batch()
    halves_BT = torch.full((B, T), 0.5)
    halved = policy_loss(**inputs, importance_weights_BT=halves_BT).loss
    torch.testing.assert_close(halved, 0.5 * policy_loss(**inputs).loss)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="advantages"):
        policy_loss(**(batch() | {"advantages_BT": torch.zeros(B, 1)}))
    with pytest.raises(ValueError, match="returns"):
        value_loss(**(value_batch() | {"returns_BT": torch.zeros(B, 1)}))
