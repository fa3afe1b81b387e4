"""From replies to advantages: bootstrap, penalties, whitening, metrics; by hand where a person can redo it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from chatalign.engine.ppo_experience import Episodes, evaluation_metrics, final_scores, make_experience
from chatalign.recipe import PpoSection

PLAIN = {"gamma": 1.0, "lam": 0.5, "whiten_advantages": False, "missing_eos_penalty": None}


def episodes(*, ended: list[bool], lengths: list[int], scores: list[float]) -> Episodes:
    count = sum(lengths)
    return Episodes(
        prompt_ids=[[1]] * len(lengths),
        response_ids=[list(range(2, 2 + length)) for length in lengths],
        ended=torch.tensor(ended),
        logps=torch.full((count,), -1.0),
        ref_logps=torch.full((count,), -1.0),
        values=torch.zeros(count),
        bootstrap=torch.full((len(lengths),), 10.0),
        scores=torch.tensor(scores),
        score_terms={"term": torch.tensor(scores)},
    )


def test_golden_values() -> None:
    # Rewards [0, 0, 1], values 0, γ 1, λ ½ → [0.25, 0.5, 1].
    made = make_experience(episodes(ended=[True], lengths=[3], scores=[1.0]), PpoSection(**PLAIN), kl_coef=0.0)
    assert made.advantages.tolist() == [0.25, 0.5, 1.0]
    assert made.returns.tolist() == [0.25, 0.5, 1.0]


def test_the_value_after_a_cut_counts_and_after_a_stop_does_not() -> None:
    made = make_experience(
        episodes(ended=[True, False], lengths=[1, 1], scores=[1.0, 1.0]), PpoSection(**PLAIN), kl_coef=0.0
    )
    assert made.advantages.tolist() == [1.0, 11.0]


def test_kl_is_paid_for_token_by_token() -> None:
    drawn = episodes(ended=[True], lengths=[2], scores=[1.0])
    drawn.ref_logps = torch.tensor([-1.5, -0.5])
    section = PpoSection(**{**PLAIN, "lam": 0.0})
    made = make_experience(drawn, section, kl_coef=0.2)
    assert made.advantages.tolist() == pytest.approx([-0.1, 1.1])
    assert made.metrics["objective/kl"] == pytest.approx(0.0)
    assert made.metrics["objective/kl_k3"] > 0
    assert made.metrics["objective/rlhf_reward"] == pytest.approx(1.0)


def test_score_clip_then_penalty() -> None:
    drawn = episodes(ended=[True, False], lengths=[1, 2], scores=[5.0, -5.0])
    section = PpoSection(**{**PLAIN, "reward_clip": 2.0, "missing_eos_penalty": 1.5})
    assert final_scores(drawn, section).tolist() == [2.0, -3.5]


def test_whitening_is_over_all_tokens_of_all_processes() -> None:
    parts = [
        episodes(ended=[True, True], lengths=[3, 1], scores=[1.0, -2.0]),
        episodes(ended=[True, False], lengths=[2, 4], scores=[0.5, 3.0]),
    ]
    section = PpoSection(**{**PLAIN, "whiten_advantages": True})
    made = make_experience(Episodes.join(parts), section, kl_coef=0.1)
    assert float(made.advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(made.advantages.std(correction=0)) == pytest.approx(1, abs=1e-5)
    alone = make_experience(parts[0], section, kl_coef=0.1)
    assert not torch.allclose(alone.advantages, made.advantages[:4])


def test_whitened_rewards_keep_their_mean() -> None:
    section = PpoSection(**{**PLAIN, "lam": 0.0, "whiten_rewards": True})
    drawn = episodes(ended=[True, True], lengths=[1, 1], scores=[1.0, 3.0])
    made = make_experience(drawn, section, kl_coef=0.0)
    assert made.advantages.tolist() == pytest.approx([1.0, 3.0], abs=1e-4)  # deviation 1 already
    scaled = dataclasses.replace(drawn, scores=torch.tensor([2.0, 6.0]))
    assert make_experience(scaled, section, kl_coef=0.0).advantages.tolist() == pytest.approx([3.0, 5.0], abs=1e-4)


def test_selected_rows_bring_their_own_numbers() -> None:
    drawn = episodes(ended=[True, True, True], lengths=[2, 1, 3], scores=[1.0, 2.0, 3.0])
    drawn.logps = torch.arange(6.0)
    made = make_experience(drawn, PpoSection(**PLAIN), kl_coef=0.0)
    chosen = made.select([2, 0])
    assert chosen["response_ids"] == [[2, 3, 4], [2, 3]]
    assert chosen["old_logps"].tolist() == [3.0, 4.0, 5.0, 0.0, 1.0]
    assert chosen["advantages"].tolist() == pytest.approx([0.75, 1.5, 3.0, 0.5, 1.0])


def test_evaluation_gives_an_observation_a_reply() -> None:
    drawn = episodes(ended=[True, False], lengths=[2, 3], scores=[1.0, 2.0])
    observed = evaluation_metrics(drawn, PpoSection(missing_eos_penalty=1.0), kl_coef=0.1)
    assert observed["objective/score"].tolist() == [1.0, 1.0]
    assert observed["reply/length"].tolist() == [2.0, 3.0]
    assert observed["reply/eos_rate"].tolist() == [1.0, 0.0]
    assert observed["objective/kl"].tolist() == [0.0, 0.0]
