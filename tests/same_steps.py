"""Short runs of the native stages, step by step, and what it means that two of them are the same.

What trains is a tiny Llama on 18 rows of unequal lengths, with plain SGD, which hides no scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatalign.recipe.load import merge
from chatalign.recipe.stages import STAGES

LORA = {"r": 4, "lora_alpha": 8}
PREPARED = ("pretrain", "sft", "reward", "dpo")  # stages whose rows are there before training
NATIVE = (*PREPARED, "ppo")
WORDS = ("hello", "world", "thank you", "the answer is Paris", "the capital of France", "1 + 2 = 3", "你好，世界")
FILES = {"pretrain": "text", "sft": "turns", "reward": "pairs", "dpo": "pairs", "ppo": "prompts"}
REWARD = '''
def letters(*, prompts, replies, extras):
    """A point for each letter a, a tenth less for each character."""
    return [reply.count("a") - 0.1 * len(reply) for reply in replies]
'''
BAR = 1e-5
ROUNDING = 5e-7  # of a mean of differences: four units in the last place of a float32
RATES = {"reward": 0.002}  # at the others' rate its margins run to 3 and more, where −log σ magnifies rounding
Line = dict[str, float]


def signed_residuals(ours: Sequence[float], theirs: Sequence[float]) -> Tensor:
    """(ours − theirs) / |theirs| for each step, in float64; PPO's loss is a sum that can be near 0, hence the floor."""
    mine, base = (torch.tensor(values, dtype=torch.float64) for values in (ours, theirs))
    return (mine - base) / base.abs().clamp_min(0.1)


def assert_zero_mean(residuals: Tensor) -> None:
    """Raise AssertionError where signed differences lean to one side: |mean| > 3 standard errors and above rounding.

    Sums of floats in another order err to both sides, so over the steps their differences cancel. A weight or divisor
    that is a little wrong errs to one side at each step, and can do so far below any bar on a single step.
    """
    mean, error = float(residuals.mean().abs()), float(residuals.std()) / len(residuals) ** 0.5
    assert mean <= max(3 * error, ROUNDING), f"mean {mean:.1e} of {residuals.tolist()}: all lean to one side"


def assert_same_steps(ours: list[Line], theirs: list[Line]) -> None:
    """Loss and gradient norm of each step within 1e-5 of the baseline's, relative, and off it to both sides."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert len(ours) >= 4
    for name in ("loss", "grad_norm"):
        residuals = signed_residuals([line[name] for line in ours], [line[name] for line in theirs])
        assert float(residuals.abs().max()) <= BAR, f"{name}: {residuals.tolist()}"
        assert_zero_mean(residuals)


def _rows() -> dict[str, list[dict[str, Any]]]:
    """18 rows of each file, of unequal lengths and numbers of targets; the fifth step of an epoch has two rows."""
    texts = [" ".join(WORDS[(i + j) % 7] for j in range(1 + i * 3 % 5)) for i in range(18)]
    replies = [" ".join(WORDS[(i * 2 + j) % 7] for j in range(1 + i * 5 % 4)) for i in range(18)]
    turns = [
        {"messages": [{"role": "user", "content": f"{text} {i}?"}, {"role": "assistant", "content": reply}]}
        for i, (text, reply) in enumerate(zip(texts, replies, strict=True))
    ]
    pairs = [
        {"prompt": f"{text} {i}?", "chosen": reply, "rejected": f"{WORDS[i % 7]} no {i}"}
        for i, (text, reply) in enumerate(zip(texts, replies, strict=True))
    ]
    numbered = [f"{text} {i}" for i, text in enumerate(texts)]
    return {
        "text": [{"text": text} for text in numbered],
        "turns": turns,
        "pairs": pairs,
        "prompts": [{"prompt": text} for text in numbered],
    }


def write_rows(folder: Path) -> Path:
    """Write every file of rows, and PPO's reward, into `folder`."""
    for name, lines in _rows().items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
    (folder / "rewards.py").write_text(REWARD, "utf-8")
    return folder


def recipe_of(stage: str, over: Mapping[str, Any], *, folder: Path, rows: Path, model: Path) -> dict[str, Any]:
    """A recipe of 5 steps (PPO: 8) of up to 4 rows, run in `folder`, with `over` on top."""
    raw: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(folder),
        "model": {"name_or_path": str(model)},
        "data": {"datasets": [{"path": str(rows / f"{FILES[stage]}.jsonl")}], "max_length": 96},
        "train": {
            "optim": "sgd",
            "learning_rate": RATES.get(stage, 0.1),
            "max_grad_norm": 1e3,
            "per_device_train_batch_size": 4,
            "max_steps": 5,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "save_strategy": "no",
            "use_cpu": True,
        },
    }
    if stage == "ppo":
        raw["ppo"] = {
            "total_episodes": 16,
            "rollout_batch_size": 8,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "response_length": 8,
            "rewards": [{"function": f"{rows / 'rewards.py'}:letters"}],
        }
        raw["train"] |= {"max_steps": -1}
    elif stage in ("pretrain", "sft"):
        raw["data"]["packing"] = False
    return merge(raw, dict(over))


def run(recipe: Mapping[str, Any]) -> list[Line]:
    """Run a stage here; what it logged at each step."""
    import_module(f"chatalign.{recipe['stage']}").run(STAGES[recipe["stage"]].model_validate(recipe))
    return logged(Path(recipe["output_dir"]))


def logged(folder: Path) -> list[Line]:
    """What a run logged at each step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if "loss" in line]
