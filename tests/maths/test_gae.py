"""Response mask, token rewards and GAE: values by hand, a NumPy oracle, noise after the stop token."""

import numpy as np
import pytest
import torch

from chatalign.maths import gae, response_mask, token_rewards

EOS, PAD = 2, 2  # pad is EOS, as in most chat models


def numpy_gae(rewards, values, bootstrap, gamma, lam):  # type: ignore[no-untyped-def]
    """One reply, from the definition A_t = Σ_k (γλ)^k δ_{t+k}, with no recursion."""
    values = np.append(values, bootstrap)
    deltas = rewards + gamma * values[1:] - values[:-1]
    return np.array([sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))])


def test_golden() -> None:
    advantages_BT, returns_BT = gae(torch.tensor([[0.0, 0, 1]]), torch.zeros(1, 3), torch.ones(1, 3), 1.0, 0.5)
    assert advantages_BT.tolist() == returns_BT.tolist() == [[0.25, 0.5, 1.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.97, 1.0)])
def test_against_numpy_with_and_without_bootstrap(gamma: float, lam: float) -> None:
    lengths, T = [3, 7, 1, 5], 7
    rewards_BT, values_BT = torch.randn(4, T), torch.randn(4, T)
    mask_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
    bootstrap_B = torch.tensor([0.0, 0.7, 0.0, -1.2])
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, lam, bootstrap_B)
    for row, n in enumerate(lengths):
        expected = numpy_gae(
            rewards_BT[row, :n].double().numpy(), values_BT[row, :n].numpy(), bootstrap_B[row].item(), gamma, lam
        )
        np.testing.assert_allclose(advantages_BT[row, :n], expected, atol=1e-6)
        np.testing.assert_allclose(returns_BT[row, :n], expected + values_BT[row, :n].numpy(), atol=1e-6)
        assert (advantages_BT[row, n:] == 0).all()
        assert (returns_BT[row, n:] == 0).all()


def test_lambda_one_returns_are_the_discounted_rewards_whatever_the_values() -> None:
    rewards_BT, mask_BT = torch.randn(3, 6), torch.ones(3, 6, dtype=torch.bool)
    discounted_BT = torch.zeros(3, 6)
    running_B = torch.zeros(3)
    for t in reversed(range(6)):
        running_B = rewards_BT[:, t] + 0.9 * running_B
        discounted_BT[:, t] = running_B
    for _ in range(3):
        _, returns_BT = gae(rewards_BT, torch.randn(3, 6), mask_BT, 0.9, 1.0)
        torch.testing.assert_close(returns_BT, discounted_BT, atol=1e-5, rtol=1e-5)


def test_lambda_one_advantage_and_value_of_a_cut_reply_are_its_discounted_return() -> None:
    lengths, T, gamma = [6, 2, 4], 6, 0.9
    rewards_BT, values_BT, last_B = torch.randn(3, T).double(), torch.randn(3, T).double(), torch.randn(3).double()
    mask_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
    advantages_BT, _ = gae(rewards_BT, values_BT, mask_BT, gamma, 1.0, last_B)
    for row, n in enumerate(lengths):
        for t in range(n):
            paid = sum(gamma ** (k - t) * rewards_BT[row, k].item() for k in range(t, n))
            expected = paid + gamma ** (n - t) * last_B[row].item()
            assert (advantages_BT + values_BT)[row, t].item() == pytest.approx(expected, abs=1e-9)


def test_lambda_zero_is_the_one_step_error() -> None:
    rewards_BT, values_BT = torch.randn(2, 4), torch.randn(2, 4)
    advantages_BT, _ = gae(rewards_BT, values_BT, torch.ones(2, 4), 0.9, 0.0)
    next_values_BT = torch.cat([values_BT[:, 1:], torch.zeros(2, 1)], dim=1)
    torch.testing.assert_close(advantages_BT, rewards_BT + 0.9 * next_values_BT - values_BT)


def test_noise_after_the_stop_token_changes_nothing() -> None:
    ids_BT = torch.tensor([[5, 6, EOS, PAD, PAD], [7, 8, 9, 4, 5]])
    noisy_ids_BT = torch.tensor([[5, 6, EOS, 9, 1], [7, 8, 9, 4, 5]])
    for noise in (0.0, 1e9, float("nan")):
        mask_BT, ended_B = response_mask(noisy_ids_BT if noise else ids_BT, [EOS])
        assert mask_BT.tolist() == [[True, True, True, False, False], [True] * 5]
        assert ended_B.tolist() == [True, False]
        kl_BT, values_BT = torch.full((2, 5), 0.1), torch.full((2, 5), 0.3)
        kl_BT[0, 3:] = values_BT[0, 3:] = noise
        rewards_BT = token_rewards(torch.tensor([1.0, -1.0]), kl_BT, mask_BT, 0.5)
        results = gae(rewards_BT, values_BT, mask_BT, 1.0, 0.95, torch.tensor([0.0, 0.3]))
        if noise == 0.0:
            clean = results
        assert all(torch.equal(a, b) for a, b in zip(clean, results, strict=True))


def test_a_hole_in_the_mask_is_skipped() -> None:
    # A tool's output between two turns of the policy: the same as if it were not there.
    rewards_BT, values_BT = torch.randn(1, 5), torch.randn(1, 5)
    mask_BT = torch.tensor([[True, True, False, False, True]])
    kept = [0, 1, 4]
    short_BT, _ = gae(rewards_BT[:, kept], values_BT[:, kept], torch.ones(1, 3), 0.9, 0.8)
    holed_BT, _ = gae(rewards_BT, values_BT, mask_BT, 0.9, 0.8)
    assert torch.equal(holed_BT[:, kept], short_BT)


def test_token_rewards_by_hand() -> None:
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    kl_BT = torch.tensor([[0.5, 1.0, 7.0], [0.0, -1.0, 2.0]])
    rewards_BT = token_rewards(torch.tensor([3.0, -2.0]), kl_BT, mask_BT, 0.1)
    torch.testing.assert_close(rewards_BT, torch.tensor([[-0.05, 2.9, 0.0], [0.0, 0.1, -2.2]]))
    with pytest.raises(ValueError, match="row 1 has no response token"):
        token_rewards(torch.zeros(2), kl_BT, mask_BT & torch.tensor([[True], [False]]), 0.1)


def test_response_mask_through_the_first_of_several_stop_tokens() -> None:
    ids_BT = torch.tensor([[1, 9, 2, 9], [2, 2, 2, 2], [1, 3, 4, 5]])
    mask_BT, ended_B = response_mask(ids_BT, [2, 9])
    assert mask_BT.sum(dim=1).tolist() == [2, 1, 4]
    assert ended_B.tolist() == [True, True, False]


def test_padding_of_a_cut_reply_does_not_end_it() -> None:
    ids_BT = torch.tensor([[5, 6, PAD, PAD], [5, EOS, PAD, PAD]])
    mask_BT, ended_B = response_mask(ids_BT, [EOS], lengths_B=torch.tensor([2, 2]))
    assert mask_BT.tolist() == [[True, True, False, False]] * 2
    assert ended_B.tolist() == [False, True]
    everything_BT, ended_B = response_mask(ids_BT, [])
    assert everything_BT.all()
    assert not ended_B.any()


def test_nothing_carries_a_gradient() -> None:
    values_BT = torch.randn(1, 3, requires_grad=True)
    for result in gae(torch.randn(1, 3), values_BT, torch.ones(1, 3), 1.0, 0.9, values_BT[:, 0]):
        assert not result.requires_grad


def test_shapes_that_do_not_fit_are_refused() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="shapes differ"):
        gae(ones, ones[:1], ones, 1.0, 1.0)
    with pytest.raises(ValueError, match="bootstrap"):
        gae(ones, ones, ones, 1.0, 1.0, torch.ones(3))
    with pytest.raises(ValueError, match="score"):
        token_rewards(torch.ones(3), ones, ones, 0.1)
    with pytest.raises(ValueError, match="lengths"):
        response_mask(torch.ones(2, 3, dtype=torch.long), [1], torch.ones(3))
    with pytest.raises(ValueError, match="response_ids"):
        response_mask(torch.ones(3, dtype=torch.long), [1])
