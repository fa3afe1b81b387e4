"""Failures of reward models: the head, the place where a score is read, its precision, its scale, its taste."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatalign import reward
from chatalign.engine import reward_trainer
from chatalign.engine.ppo_roles import build_roles
from chatalign.engine.reward_trainer import refuse_length_bias
from chatalign.maths.length import length_bias
from chatalign.models import adapters, heads
from chatalign.models.adapters import load_policy
from chatalign.models.heads import load_reward_model
from chatalign.models.load import load_tokenizer
from chatalign.recipe import ModelSection, validate_stage
from mutants.guard_table import named

WORDS = ["hello", "world", "Paris", "thank you", "capital"]
LORA = {"r": 4, "lora_alpha": 8}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def recipe_of(folder: Path, base: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Any:
    rows = rows or [{"prompt": f"{a} {b}?", "chosen": f"{b}.", "rejected": f"{a} no"} for a in WORDS for b in WORDS[:2]]
    raw = {
        "stage": "reward",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(base)},
        "data": {"datasets": [{"path": str(write_rows(folder, rows))}], "max_length": 64},
        "train": {"learning_rate": 1e-3, "max_steps": 3, "use_cpu": True},
    }
    return validate_stage(raw | sections, where="test")


# 32: the head


def test_a_head_that_peft_freezes(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # task_type None: peft trains and saves no head of its own accord
    wrapped = adapters.new_adapter
    monkeypatch.setattr(
        heads, "new_adapter", lambda *args, task_type, **kwargs: wrapped(*args, task_type=None, **kwargs)
    )
    monkeypatch.setattr(heads, "_with_score", lambda modules: modules)
    with named(32):
        reward.run(recipe_of(tmp_path, tiny_model_folder, lora=LORA))


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_head_that_is_not_saved(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, lora: Any
) -> None:
    from chatalign.engine import stage

    save = stage.save_model

    def without_score(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        for path in Path(args[2]).glob("*.safetensors"):
            kept = {name: tensor for name, tensor in load_file(path).items() if "score" not in name}
            save_file(kept, path, metadata={"format": "pt"})

    monkeypatch.setattr(stage, "save_model", without_score)
    with named(32):
        reward.run(recipe_of(tmp_path, tiny_model_folder, **({"lora": lora} if lora else {})))


# 37: where the score is read


def test_a_pad_token_that_ends_replies(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = reward.new_reward_model

    def pad_is_eos(recipe: Any, tokenizer: Any) -> Any:
        made = new(recipe, tokenizer)
        made.model.config.pad_token_id = tokenizer.eos_token_id
        return made

    monkeypatch.setattr(reward, "new_reward_model", pad_is_eos)
    with named(37):
        reward.run(recipe_of(tmp_path, tiny_model_folder))


def test_a_score_read_one_token_early(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatalign.engine import pooling

    collate = pooling.collate_pairs

    def early(rows: Any) -> Any:
        batch = dict(collate(rows))
        return batch | {"pool_positions": batch["pool_positions"] - 1}

    monkeypatch.setattr(pooling, "collate_pairs", early)
    with named(37):
        reward.run(recipe_of(tmp_path, tiny_model_folder))


# 38: ties


def test_a_head_that_counts_in_bfloat16(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_bfloat16(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.bfloat16(), self.weight.bfloat16()).float()

    monkeypatch.setattr(heads.ScoreHead, "forward", in_bfloat16)
    with named(38):
        reward.run(recipe_of(tmp_path, tiny_model_folder))


# 39: the scale


@pytest.fixture(scope="module")
def reward_runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Path]:
    """A finished reward adapter and a finished whole reward model."""
    runs = {}
    for name, sections in (("adapter", {"lora": LORA}), ("whole", {})):
        folder = tmp_path_factory.mktemp(name)
        reward.run(recipe_of(folder, tiny_model_folder, **sections))
        runs[name] = folder / "run"
    return runs


def load(folder: Path) -> Any:
    section = ModelSection(name_or_path=str(folder))
    return load_reward_model(section, load_tokenizer(section)).model


@contextmanager
def three_times_the_scores(run: Path) -> Iterator[None]:
    file = next((run / "model").glob("*.safetensors"))
    tensors = load_file(file)
    score = next(key for key in tensors if key.endswith("score.weight"))
    save_file(tensors | {score: 3 * tensors[score]}, file, metadata={"format": "pt"})
    yield
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["adapter", "whole"])
def test_scores_whose_scale_has_drifted(reward_runs: dict[str, Path], name: str) -> None:
    assert load(reward_runs[name]).training is False
    with three_times_the_scores(reward_runs[name]), named(39):
        load(reward_runs[name])


def test_a_drifted_adapter_on_the_policys_backbone(
    reward_runs: dict[str, Path], tmp_path: Path, tiny_model_folder: Path
) -> None:
    recipe = recipe_of(
        tmp_path,
        tiny_model_folder,
        [{"prompt": word} for word in WORDS[:4]],
        stage="ppo",
        lora=LORA,
        reward_model={"name_or_path": str(reward_runs["adapter"])},
        ppo={"total_episodes": 4, "rollout_batch_size": 4, "response_length": 4},
        train={"use_cpu": True},
    )
    tokenizer = load_tokenizer(recipe.model)
    stops = [tokenizer.eos_token_id]
    assert build_roles(recipe, load_policy(recipe, tokenizer), tokenizer, stops).rewards.terms[0].scorer.adapter
    with three_times_the_scores(reward_runs["adapter"]), named(39):
        build_roles(recipe, load_policy(recipe, tokenizer), tokenizer, stops)


def test_the_scale_is_stored_with_the_run_and_the_model(reward_runs: dict[str, Path]) -> None:
    extra = json.loads((reward_runs["whole"] / "artifact.json").read_text())["extra"]
    config = json.loads((reward_runs["whole"] / "model" / "config.json").read_text())
    assert config["score_probe"] == extra["score_probe"]
    assert extra["score_probe"]["spread"] == pytest.approx(config["score_std"])
    assert set(extra["length_bias"]) >= {"length_gap", "score_length_correlation", "longer_accuracy"}


# 46: length


def test_a_model_that_ranks_by_length(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the chosen replies are the shorter ones, and the scores are the replies' lengths."""
    scores = reward_trainer.scores_at

    def lengths(model: Any, batch: Any) -> torch.Tensor:
        table = batch["segments"]
        replies = table[table[:, 3] > table[:, 2]]
        return scores(model, batch) * 0 + (replies[:, 1] - replies[:, 0])

    short, long = "yes", "yes, thank you for that"
    sides = [{"chosen": short, "rejected": long}, {"chosen": long, "rejected": short}]
    rows = [{"prompt": f"{i}?", **sides[i % 2]} for i in range(64)]
    monkeypatch.setattr(reward_trainer, "scores_at", lengths)
    recipe = recipe_of(tmp_path, tiny_model_folder, rows)
    with named(46):
        reward.run(recipe)
    allowed = {"reward": recipe.reward.model_copy(update={"max_length_bias": 1.0}), "output_dir": str(tmp_path / "ok")}
    found = reward.run(recipe.model_copy(update=allowed)).extra["length_bias"]
    assert (found["longer"], found["longer_accuracy"]) == (32, 1.0)
    assert (found["shorter"], found["shorter_accuracy"]) == (32, 0.0)
    assert found["length_gap"] == 0
    assert found["score_length_correlation"] == pytest.approx(1.0)


def test_longer_may_be_what_was_asked_for() -> None:
    """Where nearly all chosen replies are the longer ones, a few others are no proof."""
    lengths = torch.tensor([9.0, 4.0] * 200 + [4.0, 9.0] * 35)
    bias = length_bias(lengths, lengths)
    assert bias.bias == 1.0
    refuse_length_bias(bias, 0.9)
    few = torch.tensor([9.0, 4.0, 4.0, 9.0] * 10)
    refuse_length_bias(length_bias(few, few), 0.9)
