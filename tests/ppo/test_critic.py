"""`value_model`: a critic with weights of its own beside any policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import make_llama, make_tokenizer

from chatalign import ppo
from chatalign.errors import ModelError

from .conftest import LORA, Make, built
from .test_roles import one_by_one, spied
from .test_run import logged, weights

ONCE = {"num_mini_batches": 1, "num_ppo_epochs": 1, "missing_eos_penalty": None}


def critic(folder: Path, **over: Any) -> dict[str, Any]:
    return {"value_model": {"name_or_path": str(folder)}, "lora": LORA, "ppo": ONCE} | over


@pytest.mark.parametrize("kind", ["reward_full_run", "reward_adapter_run"])
def test_a_reward_model_as_the_critic(make_recipe: Make, request: pytest.FixtureRequest, kind: str) -> None:
    folder = request.getfixturevalue(kind)
    over = critic(folder, ppo=ONCE | {"rewards": []}) | {"reward_model": {"name_or_path": str(folder)}}
    trainer = built(make_recipe("run", over))
    model = trainer.model
    assert model.value_adapter is None
    assert "value" not in model.policy.peft_config
    policy_weights = {id(parameter) for parameter in model.policy.parameters()}
    assert not any(id(parameter) in policy_weights for parameter in model.value_trunk.parameters())
    before = {name: p.detach().clone() for name, p in model.value_trunk.named_parameters()}
    kept = spied(trainer)
    trainer.train()
    episodes = kept[0].episodes
    sequences = [[*p, *r] for p, r in zip(episodes.prompt_ids, episodes.response_ids, strict=True)]
    normaliser = trainer.play.collector.rewards.terms[0].normaliser
    normal = [(score - normaliser.mean) / normaliser.std for score in one_by_one(folder, sequences)]
    assert episodes.bootstrap.tolist() == pytest.approx(normal, abs=1e-4), "V starts as the reward that is paid"
    moved = {name for name, p in model.value_trunk.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before), "every weight of the critic trains"


@pytest.mark.parametrize("kind", ["tiny_model_folder", "sft_run"])
def test_a_language_model_as_the_critic_starts_at_zero(
    make_recipe: Make, request: pytest.FixtureRequest, kind: str
) -> None:
    trainer = built(make_recipe("run", critic(request.getfixturevalue(kind))))
    kept = spied(trainer)
    trainer.train()
    assert not kept[0].episodes.values.any()
    assert kept[1].episodes.values.any()


def test_what_is_saved_is_the_policy_alone(make_recipe: Make, reward_full_run: Path) -> None:
    recipe = make_recipe("run", critic(reward_full_run))
    artifact = ppo.run(recipe)
    assert artifact.kind == "adapter"
    assert {parent.role for parent in artifact.parents} == {"value_model"}
    assert all("lora_" in name for name in weights(recipe))
    assert len(logged(recipe)) == 2


def test_another_vocabulary_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    other = make_tokenizer(vocab_size=300)
    make_llama(len(other), seed=3).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="another vocabulary"):
        built(make_recipe("run", critic(tmp_path / "other")))


def test_it_contradicts_a_shared_trunk(make_recipe: Make, reward_full_run: Path) -> None:
    with pytest.raises(ValidationError, match="`value_model` is a critic of its own"):
        make_recipe("run", critic(reward_full_run, ppo=ONCE | {"value": "shared"}))
