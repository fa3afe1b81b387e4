"""`normalize_reward: replies`: the scale comes from the policy that the run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chatalign import ppo
from chatalign.engine import ppo_normalise
from chatalign.errors import ModelError

from .conftest import LORA, Make, built
from .test_resume import go_on_from
from .test_roles import one_by_one, spied
from .test_run import logged, weights


def over(folder: Path, **ppo_keys: Any) -> dict[str, Any]:
    section = {"rewards": [], "normalize_reward": "replies", "missing_eos_penalty": None} | ppo_keys
    return {"reward_model": {"name_or_path": str(folder)}, "ppo": section}


def drawn(trainer: Any) -> list[Any]:
    kept: list[Any] = []
    draw = trainer.play.collector.draw
    trainer.play.collector.draw = lambda *args: kept.append(draw(*args)) or kept[-1]
    return kept


@pytest.mark.parametrize("critic", [False, True])
def test_scores_and_values_are_in_units_of_the_first_replies(
    make_recipe: Make, reward_full_run: Path, critic: bool
) -> None:
    value_model = {"value_model": {"name_or_path": str(reward_full_run)}} if critic else {}
    trainer = built(make_recipe("run", over(reward_full_run) | value_model))
    assert trainer.play.collector.rewards.terms[0].normaliser is None
    first, kept = drawn(trainer), spied(trainer)
    trainer.train()
    (replies,) = first
    raw = one_by_one(reward_full_run, [[*p, *r] for p, r in zip(replies.prompt_ids, replies.response_ids, strict=True)])
    mean, std = torch.tensor(raw).mean().item(), torch.tensor(raw).std(correction=0).item()
    episodes = kept[0].episodes
    normal = [(score - mean) / std for score in episodes.score_terms["model"].tolist()]
    assert episodes.scores.tolist() == pytest.approx(normal, abs=1e-3)
    assert episodes.bootstrap.tolist() == pytest.approx(normal, abs=1e-3), "V starts in the same units"


def test_a_resumed_run_keeps_the_scale(make_recipe: Make, reward_full_run: Path, monkeypatch: Any) -> None:
    keys = over(reward_full_run) | {"train": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}}
    whole = make_recipe("whole", keys | {"lora": LORA})
    ppo.run(whole)
    for step in (1, 4):  # in the middle of the first rollout, and after it
        resumed = make_recipe(f"resumed{step}", keys | {"lora": LORA})
        go_on_from(Path(whole.output_dir), step, Path(resumed.output_dir))
        monkeypatch.setattr(ppo_normalise, "_REPLIES", 0)  # fitted again, it would fail
        ppo.run(resumed)
        assert len(logged(resumed)) == 8 - step
        for name, tensor in weights(whole).items():
            assert torch.equal(weights(resumed)[name], tensor), name


def test_one_score_for_all_is_refused(make_recipe: Make, reward_full_run: Path) -> None:
    trainer = built(make_recipe("run", over(reward_full_run)))
    with torch.no_grad():
        trainer.play.collector.rewards.terms[0].scorer.head.weight.zero_()
    with pytest.raises(ModelError, match="one score"):
        trainer.train()
