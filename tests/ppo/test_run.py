"""Whole runs on a tiny model: what is trained, what is logged, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatalign import ppo
from chatalign.errors import DataError, NonFiniteError, RecipeError
from chatalign.recipe import PpoRecipe

from .conftest import LORA, Make


def logged(recipe: PpoRecipe) -> list[dict[str, Any]]:
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def weights(recipe: PpoRecipe) -> dict[str, torch.Tensor]:
    (path,) = Path(recipe.output_dir, "model").glob("*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_each_minibatch_is_an_optimizer_step_and_the_policy_alone_is_saved(
    make_recipe: Make, tiny_model_folder: Path, lora: dict[str, Any] | None, value: str
) -> None:
    recipe = make_recipe("run", {"lora": lora, "ppo": {"value": value}})
    artifact = ppo.run(recipe)
    steps = logged(recipe)
    assert [line["step"] for line in steps] == list(range(1, 2 * 2 * 2 + 1))
    assert all(line["grad_norm"] > 0 for line in steps)
    assert artifact.kind == ("adapter" if lora else "model")
    names = weights(recipe).keys()
    assert not [name for name in names if "value" in name or "reference" in name or name == "lm_head.bias"]
    if not lora:
        assert names == load_file(tiny_model_folder / "model.safetensors").keys()


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_minibatches_multiply_the_steps(make_recipe: Make, minibatches: int) -> None:
    # The removed trainer made the same number of steps with 1, 2 and 4 (TRL #5645).
    recipe = make_recipe("run", {"ppo": {"num_mini_batches": minibatches, "num_ppo_epochs": 1}})
    ppo.run(recipe)
    assert logged(recipe)[-1]["step"] == 2 * minibatches


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("lora", [None, LORA])
def test_ratio_is_1_and_kl_0_before_any_update(
    make_recipe: Make, temperature: float, lora: dict[str, Any] | None
) -> None:
    once = {"num_mini_batches": 1, "num_ppo_epochs": 1, "temperature": temperature}
    recipe = make_recipe("run", {"lora": lora, "ppo": once})
    ppo.run(recipe)
    first, second = logged(recipe)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["objective/kl_k3"] == pytest.approx(0, abs=1e-5)
    assert second["objective/kl_k3"] > 1e-5, "the policy moved, its reference didn't"
    for line in (first, second):
        assert line["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert line["policy/approxkl"] == pytest.approx(0, abs=1e-8)
        assert line["policy/clipfrac"] == 0
        assert line["sampler/logprob_gap"] < 1e-5


def test_8_micro_batches_of_1_are_1_of_8(make_recipe: Make) -> None:
    results = []
    for size in (1, 3, 8):
        recipe = make_recipe(
            f"run{size}", {"train": {"per_device_train_batch_size": size}, "ppo": {"num_mini_batches": 1}}
        )
        ppo.run(recipe)
        results.append((weights(recipe), logged(recipe)))
    for theirs, lines in results[1:]:
        for name, ours in results[0][0].items():
            torch.testing.assert_close(theirs[name], ours, rtol=0, atol=1e-5)
        for mine, yours in zip(results[0][1], lines, strict=True):
            for key in ("loss", "policy/approxkl", "loss/value"):
                assert yours[key] == pytest.approx(mine[key], abs=1e-5)


def test_prompts_reach_a_reward_with_their_own_columns(make_recipe: Make, reward_file: Path) -> None:
    rewards = [{"function": f"{reward_file}:number", "weight": 2.0}, {"function": f"{reward_file}:letters"}]
    ppo_keys = {"rewards": rewards, "missing_eos_penalty": None, "num_ppo_epochs": 1, "num_mini_batches": 1}
    recipe = make_recipe("run", {"ppo": ppo_keys})
    ppo.run(recipe)
    for line in logged(recipe):
        # Eight prompts a rollout of eight: each number from 0 to 7 once.
        assert line["reward/number"] == 3.5
        assert line["objective/score"] == pytest.approx(2 * 3.5 + line["reward/letters"])


def test_target_kl_ends_a_rollout_early(make_recipe: Make) -> None:
    cut = make_recipe("cut", {"ppo": {"target_kl": 1e-9, "num_ppo_epochs": 4}})
    artifact = ppo.run(cut)
    # The first step's KL is 0, the second's isn't: two steps a rollout.
    assert logged(cut)[-1]["step"] == 4
    assert artifact.extra["skipped_steps"] == 2 * (8 - 2)


def test_value_warm_up_leaves_the_policy_alone(make_recipe: Make, tiny_model_folder: Path) -> None:
    for value in ("separate", "shared"):
        recipe = make_recipe(f"warm-{value}", {"ppo": {"value_warmup_rollouts": 2, "value": value}})
        ppo.run(recipe)
        before = load_file(tiny_model_folder / "model.safetensors")
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(recipe).items())
        values = [line["value/mean"] for line in logged(recipe) if "value/mean" in line]
        assert values[0] == 0
        assert values[1] < -0.01, "the value function learned that rewards are negative"


def test_pretraining_mix_and_entropy_bonus_and_evaluation(make_recipe: Make, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "1 + 2", "completion": "3"}) + "\n" for _ in range(5)), "utf-8")
    recipe = make_recipe(
        "run",
        {
            "ppo": {"ptx_coef": 0.5, "entropy_coef": 0.01},
            "ptx_data": {"datasets": [{"path": str(rows)}]},
            "data": {"eval_fraction": 0.3},
            "train": {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
        },
    )
    ppo.run(recipe)
    steps = logged(recipe)
    assert steps[-1]["loss/ptx"] < steps[0]["loss/ptx"]
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()]
    scores = [line["eval_objective/score"] for line in lines if "eval_objective/score" in line]
    assert len(scores) == 3
    assert next(line for line in lines if "eval_objective/kl" in line)["eval_objective/kl"] == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("broken", NonFiniteError, "reward `broken` gave nan for the reply"),
        ("short", DataError, "gave 1 scores for 8 replies"),
        ("missing", RecipeError, "has no function `missing`"),
    ],
)
def test_a_bad_reward_function_is_refused(
    make_recipe: Make, reward_file: Path, name: str, error: type[Exception], message: str
) -> None:
    recipe = make_recipe("run", {"ppo": {"rewards": [{"function": f"{reward_file}:{name}"}]}})
    with pytest.raises(error, match=message):
        ppo.run(recipe)


def test_prompts_too_long_for_the_model_are_refused(make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match=r"set `data\.max_prompt_length` to 12 or less"):
        ppo.run(make_recipe("run", {"ppo": {"response_length": 500}}))
