"""What a checkpoint carries over into a changed run, and what it can't: each key with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from chatalign import carry
from chatalign.carry import reasons
from chatalign.changes import Change
from chatalign.recipe.schema import STAGE_NAMES, Keys

SFT_NEVER = {
    "stage": ("sft", "reward"),
    "engine": ("native", "trl"),
    "quantization": (None, {"load_in_4bit": True}),
    "lora": ({"r": 4}, None),
    "lora.r": (4, 8),
    "lora.target_modules": ("all-linear", ["q_proj"]),
    "lora.modules_to_save": (None, ["embed_tokens"]),
    "lora.use_dora": (False, True),
    "lora.rank_pattern.q_proj": (None, 8),
    "model.config": (None, {}),
    "model.tokenizer_name_or_path": (None, "other"),
    "model.chat_template_path.contents": ("sha256 1", "sha256 2"),
    "train.optim": ("adamw_torch_fused", "sgd"),
    "train.fp16": (False, True),
    "train.seed": (42, 43),
    "train.data_seed": (None, 43),
    "train.per_device_train_batch_size": (8, 4),
    "train.gradient_accumulation_steps": (1, 2),
    "processes": (2, 3),
}
PPO_NEVER = {
    "value_model": (None, {"name_or_path": "v"}),
    "reward_model.weights": ("sha256 1", "sha256 2"),
    "ppo.normalize_reward": (True, False),
    "ppo.value": ("separate", "shared"),
    "ppo.value_init": ("reward", "policy"),
    "ppo.value_learning_rate": (None, 1e-5),
    "ppo.rollout_batch_size": (64, 32),
    "ppo.num_ppo_epochs": (4, 2),
    "ppo.num_mini_batches": (1, 2),
    "ppo.temperature": (1.0, 0.5),
    "ppo.rollout_engine": ("transformers", "vllm_server"),
    "ppo.rewards.0.model": ("a", "b"),
    "ppo.rewards.1": (None, {"function": "f.py:f"}),
    "data.datasets.0.contents": ("sha256 1", "sha256 2"),
}
PPO_CARRIED = {
    "ppo.kl_coef": (0.05, 0.1),
    "ppo.value_learning_rate": (1e-4, 1e-5),
    "ppo.total_episodes": (64, 128),
    "ppo.rewards.0.weight": (1.0, 2.0),
    "ppo.rewards.0.function.contents": ("sha256 1", "sha256 2"),
    "train.per_device_train_batch_size": (8, 4),
    "processes": (2, 1),
}
SFT_CARRIED = {
    "train.learning_rate": (1e-3, 1e-4),
    "train.max_steps": (10, 20),
    "lora.lora_alpha": (8, 16),
    "model.weights": ("sha256 1", "sha256 2"),
    "data.datasets.0.contents": ("sha256 1", "sha256 2"),
    "chatalign": ("0.1", "0.2"),
}


def reason(stage: str, key: str, values: tuple[Any, Any], **settings: Any) -> str | None:
    both: dict[str, Any] = {"stage": stage, "lora": {"r": 4}, "ppo": {"kl_control": "fixed"}, **settings}
    now = both | ({"lora": None} if key == "lora" else {})
    return reasons([Change(key=key, before=values[0], now=values[1])], both, now).get(key)


@pytest.mark.parametrize(("key", "values"), [*SFT_NEVER.items()])
def test_what_no_checkpoint_carries(key: str, values: tuple[Any, Any]) -> None:
    assert reason("sft", key, values)


@pytest.mark.parametrize(("key", "values"), [*PPO_NEVER.items()])
def test_what_no_checkpoint_of_ppo_carries(key: str, values: tuple[Any, Any]) -> None:
    assert reason("ppo", key, values)


def test_the_keys_are_those_of_recipes() -> None:
    known = {key for name in STAGE_NAMES for key in Keys(name).known()}
    named = {*carry._NEVER, *carry._LORA_CARRIED, *carry._SCHEDULE, *carry._ROWS_A_STEP}
    assert named - known == {"processes"}


def test_what_it_carries() -> None:
    assert [key for key, values in SFT_CARRIED.items() if reason("sft", key, values)] == []
    assert [key for key, values in PPO_CARRIED.items() if reason("ppo", key, values)] == []


def test_what_depends_on_the_rest_of_the_recipe() -> None:
    rows = ("sha256 1", "sha256 2")
    assert "TRL's loader" in str(reason("sft", "data.datasets.0.contents", rows, engine="trl"))
    assert "TRL's loader" in str(reason("kto", "processes", (1, 2)))
    assert "whatever model is named" in str(reason("sft", "model.weights", rows, lora=None))
    assert reason("sft", "model.attention", ("auto", "sdpa"), lora=None) is None
    plateau = {"train": {"lr_scheduler_type": "reduce_lr_on_plateau"}}
    assert "no function of the step" in str(reason("sft", "train.learning_rate", (1, 2), **plateau))
    assert "has moved on" in str(reason("ppo", "ppo.kl_coef", (1, 2), ppo={"kl_control": "adaptive"}))
