"""A tiny PPO run: a model of 50k parameters, a dozen prompts, a reward that a file defines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatalign.recipe import PpoRecipe
from chatalign.recipe.load import merge

PROMPTS = ["hello world", "the capital", "1 + 2", "你好", "what is", "thank you", "the answer is", "of France?"]
REWARD = '''
def letters(*, prompts, replies, extras):
    """A point for each letter a, a tenth less for each character."""
    assert all(messages[-1]["role"] == "user" for messages in prompts)
    return [reply.count("a") - 0.1 * len(reply) for reply in replies]


def number(*, prompts, replies, extras):
    return [float(extra["number"]) for extra in extras]


def broken(*, prompts, replies, extras):
    return [float("nan") for _ in replies]


def short(*, prompts, replies, extras):
    return [0.0]
'''
LORA = {"r": 4, "lora_alpha": 8}
Make = Callable[..., PpoRecipe]


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "rewards.py"
    path.write_text(REWARD, "utf-8")
    return path


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": text, "number": i} for i, text in enumerate(PROMPTS)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    return path


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_model_folder: Path, reward_file: Path, prompt_file: Path) -> Make:
    """`make_recipe(name, {"ppo": {...}, "train": {...}, …})`: a tiny recipe with some keys changed."""

    def make(name: str = "run", over: dict[str, Any] | None = None) -> PpoRecipe:
        base: dict[str, Any] = {
            "stage": "ppo",
            "output_dir": str(tmp_path / name),
            "model": {"name_or_path": str(tiny_model_folder)},
            "data": {"datasets": [{"path": str(prompt_file)}]},
            "ppo": {
                "total_episodes": 16,
                "rollout_batch_size": 8,
                "num_ppo_epochs": 2,
                "num_mini_batches": 2,
                "response_length": 8,
                "rewards": [{"function": f"{reward_file}:letters"}],
            },
            "train": {
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 2,
                "logging_steps": 1,
                "save_strategy": "no",
                "warmup_steps": 0,
                "lr_scheduler_type": "constant",
                "use_cpu": True,
            },
        }
        return PpoRecipe.model_validate(merge(base, over or {}))

    return make


def built(recipe: PpoRecipe, *, stop_ids: list[int] | None = None) -> Any:
    """The trainer that `ppo.run` would train, to be looked into; `stop_ids` make a random model's replies end."""
    from chatalign.data import prepare
    from chatalign.engine.ppo_roles import build_roles
    from chatalign.engine.ppo_setup import build_trainer
    from chatalign.models.adapters import load_policy
    from chatalign.models.tokenizer import load_tokenizer
    from chatalign.runs import open_run

    tokenizer = load_tokenizer(recipe.model, chat=True)
    prepared = prepare(recipe.data, tokenizer, "prompt", seed=recipe.train.seed)
    policy = load_policy(recipe, tokenizer)
    stops = [tokenizer.eos_token_id] if stop_ids is None else stop_ids
    return build_trainer(
        recipe=recipe,
        run=open_run(recipe),
        roles=build_roles(recipe, policy, tokenizer, stops),
        tokenizer=tokenizer,
        prompt_rows=prepared.train,
        eval_rows=None,
        ptx_rows=None,
        stop_ids=stops,
    )


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A finished SFT adapter on the tiny model."""
    from chatalign import sft
    from chatalign.recipe import SftRecipe

    folder = tmp_path_factory.mktemp("sft")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": text, "completion": "thank you"}) + "\n" for text in PROMPTS), "utf-8"
    )
    recipe = {
        "stage": "sft",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(tiny_model_folder)},
        "lora": LORA,
        "data": {"datasets": [{"path": str(rows)}]},
        "train": {"learning_rate": 1e-2, "warmup_steps": 0, "save_strategy": "no", "use_cpu": True},
    }
    sft.run(SftRecipe.model_validate(recipe))
    return folder / "run"


def train_reward(folder: Path, model: Path, over: dict[str, Any] | None = None) -> Path:
    """A finished reward model from `model`, on eight pairs."""
    from chatalign import reward
    from chatalign.recipe import RewardRecipe

    pairs = [{"prompt": text, "chosen": "thank you!", "rejected": f"{i} hello"} for i, text in enumerate(PROMPTS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    recipe: dict[str, Any] = {
        "stage": "reward",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(model)},
        "data": {"datasets": [{"path": str(folder / "pairs.jsonl")}]},
        "train": {"learning_rate": 1e-2, "warmup_steps": 0, "save_strategy": "no", "use_cpu": True},
    }
    reward.run(RewardRecipe.model_validate(merge(recipe, over or {})))
    return folder / "run"


@pytest.fixture(scope="session")
def reward_adapter_run(tmp_path_factory: pytest.TempPathFactory, sft_run: Path) -> Path:
    """A reward adapter that started from the SFT adapter, on the same base."""
    return train_reward(tmp_path_factory.mktemp("reward-adapter"), sft_run)


@pytest.fixture(scope="session")
def reward_full_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A reward model with all weights trained, from the tiny model."""
    return train_reward(tmp_path_factory.mktemp("reward-full"), tiny_model_folder, {"train": {"learning_rate": 1e-3}})


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A tiny GPT-2, whose positions are learned, with half of everything dropped in training mode."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": len(tiny_tokenizer), "n_positions": 128}
    noisy = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = GPT2LMHeadModel(GPT2Config(**shape, **noisy))
    with torch.no_grad():  # of the size of the tokens' own embeddings or larger, as in a trained model
        model.transformer.wpe.weight.mul_(20)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
