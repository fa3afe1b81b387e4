"""Sampling against transformers' warpers and against the distribution itself."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from chatalign.rollout.interface import Sampling
from chatalign.rollout.sampler import Sampler, fixed_point_sums, inverse_cdf, row_uniforms, truncate


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (0.3, 0), (1.0, 5), (0.7, 10), (1.0, 0), (0.01, 0)])
def test_truncation_keeps_what_transformers_keeps(top_p: float, top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 100, dtype=torch.float64) * 2
    theirs = logits
    if top_k:
        theirs = TopKLogitsWarper(top_k)(torch.empty(0), theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(torch.empty(0), theirs)
    ours = truncate(logits.log_softmax(-1), top_p=top_p, top_k=top_k)
    assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_inverse_cdf_draws_the_distribution() -> None:
    logps = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0]).log()
    points = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(inverse_cdf(logps.expand(10_000, 5), points), minlength=5)
    assert counts.tolist() == pytest.approx([5000, 0, 3000, 2000, 0], abs=2)


def test_the_ends_of_the_uniform_range_never_draw_an_impossible_token() -> None:
    logps = torch.tensor([[0.0, 0.4, 0.6, 0.0]]).log()
    ends = torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert inverse_cdf(logps.expand(3, 4), ends).tolist() == [1, 2, 2]


def test_fixed_point_sums_are_those_of_floats_and_have_no_order() -> None:
    torch.manual_seed(0)
    probs = (torch.randn(4, 5000, dtype=torch.float64) * 3).softmax(-1)
    sums = fixed_point_sums(probs)
    torch.testing.assert_close(sums, probs.cumsum(-1), rtol=0, atol=5000 * 2**-52)
    shuffled = probs[:, torch.randperm(5000)]
    assert torch.equal(fixed_point_sums(shuffled)[:, -1], sums[:, -1])
    assert not torch.equal(shuffled.cumsum(-1)[:, -1], probs.cumsum(-1)[:, -1])  # floats' sums have one
    assert fixed_point_sums(torch.tensor([[0.5, 0.25, 0.0, 0.25]])).tolist() == [[0.5, 0.75, 0.75, 1.0]]


def test_row_uniforms_depend_on_seed_and_row_alone() -> None:
    cpu = torch.device("cpu")
    one = row_uniforms(7, [3, 4], 6, cpu)
    assert torch.equal(row_uniforms(7, [4, 9, 3], 6, cpu)[[2, 0]], one)
    assert not torch.equal(row_uniforms(8, [3, 4], 6, cpu), one)
    assert torch.equal(row_uniforms(7, [3, 4], 3, cpu), one[:, :3])
    many = row_uniforms(0, range(2000), 4, cpu)
    assert many.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(many.T).fill_diagonal_(0).abs().max() < 0.1


def test_a_stop_token_outside_the_vocabulary_is_passed_over() -> None:
    sampling = Sampling(max_new_tokens=2, min_new_tokens=1, stop_token_ids=(3, 50_000), forbidden_token_ids=(60_000,))
    sampler = Sampler(sampling, 5, torch.device("cpu"))
    logits = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0]])
    assert int(sampler.draw(logits, torch.tensor([0.5]), step=0)[0]) != 3
    assert sampler.stops(torch.tensor([3, 4])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_new_tokens": 9}, "min_new_tokens 9 and max_new_tokens 8"),
        ({"top_p": 0.0}, "top_p lies above 0"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"forbidden_token_ids": (3,)}, "both stop and forbidden"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**({"max_new_tokens": 8, "stop_token_ids": (3,)} | settings))
