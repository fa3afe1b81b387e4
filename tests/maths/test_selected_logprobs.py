"""Log-probabilities of targets against gather − logsumexp in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chatalign.maths import selected_logprobs


def by_hand(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    scaled = logits.double() / temperature
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("leading", [(9,), (2, 5), (2, 1, 3), (0,)])
def test_values_and_gradients(leading: tuple[int, ...], temperature: float) -> None:
    logits, targets = 5 * torch.randn(*leading, 11, dtype=torch.float64), torch.randint(11, leading)
    upstream = torch.randn(leading, dtype=torch.float64)
    wide, narrow = logits.clone().requires_grad_(), logits.float().requires_grad_()
    theirs = by_hand(wide, targets, temperature)
    (their_grad,) = torch.autograd.grad(theirs, wide, upstream)
    (exact, rounded) = (selected_logprobs(x, targets, temperature) for x in (wide, narrow))
    assert exact.shape == rounded.shape == leading
    assert exact.dtype == torch.float64
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(exact, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(rounded.double(), theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(exact, wide, upstream)[0], their_grad, atol=1e-12, rtol=1e-12)
    narrow_grad = torch.autograd.grad(rounded, narrow, upstream.float())[0]
    torch.testing.assert_close(narrow_grad.double(), their_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_impossible_tokens_are_left_out(temperature: float) -> None:
    logits = torch.tensor([[1.0, -math.inf, 2.0], [-math.inf, 0.0, -math.inf]], requires_grad=True)
    targets = torch.tensor([2, 1])
    logps = selected_logprobs(logits, targets, temperature)
    expected = [-math.log1p(math.exp(-1 / temperature)), 0.0]
    assert logps.tolist() == pytest.approx(expected)
    logps.sum().backward()
    assert logits.grad is not None
    p = math.exp(expected[0])
    assert logits.grad.tolist() == [
        pytest.approx([-(1 - p) / temperature, 0.0, (1 - p) / temperature]),
        pytest.approx([0.0, 0.0, 0.0]),
    ]


def test_an_impossible_target_is_minus_infinity() -> None:
    logits = torch.tensor([[1.0, -math.inf, 2.0]])
    assert selected_logprobs(logits, torch.tensor([1])).tolist() == [-math.inf]


def test_bf16_logits_and_strided_ones() -> None:
    logits, targets = torch.randn(4, 7, 6).transpose(0, 1), torch.randint(6, (7, 4))
    torch.testing.assert_close(
        selected_logprobs(logits, targets, 0.9).double(), by_hand(logits, targets, 0.9), atol=1e-5, rtol=1e-5
    )
    half = logits.bfloat16()
    logps = selected_logprobs(half, targets)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), by_hand(half, targets, 1.0), atol=1e-5, rtol=1e-5)


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 5)
    before = logits.clone()
    selected_logprobs(logits, torch.zeros(3, dtype=torch.long), 0.5)
    assert torch.equal(logits, before)


def test_a_target_that_masks_elsewhere_is_refused() -> None:
    with pytest.raises(IndexError):
        selected_logprobs(torch.zeros(2, 5), torch.tensor([1, -100]))


def test_one_token_without_leading_dimensions() -> None:
    logp = selected_logprobs(torch.zeros(5), torch.tensor(3))
    assert logp.shape == ()
    assert logp.item() == pytest.approx(-math.log(5))
