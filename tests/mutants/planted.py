"""What a fault in data or a template is planted into: a recipe with rows and a tokenizer, and no weights to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.chat_families import BY_NAME, make, tokenizer_of

from chatalign.check import check_recipe, refuse_first, tokenizer_finding
from chatalign.errors import ChatalignError
from chatalign.pipeline import run_stage
from chatalign.recipe import STAGES, Recipe
from chatalign.recipe.load import merge

CHATML = BY_NAME["chatml_plain"]
CHAT = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "thank you!"}]
TWO_REPLIES = [*CHAT, {"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "the answer is 3"}]
CHATS = [{"messages": CHAT}, {"messages": TWO_REPLIES}]
PAIRS = [{"prompt": "hello world", "chosen": "thank you!", "rejected": "what?"}] * 3


def chatml(template: str = CHATML.template, *special: str, bos: str | None = None) -> Any:
    """A new tokenizer with ChatML's tokens, BOS and further special tokens where given, and a template."""
    return make.__wrapped__(template, "<|im_end|>", bos, ("<|im_start|>", *special))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def recipe_of(
    folder: Path, stage: str = "sft", *, rows: list[dict[str, Any]] = CHATS, tokenizer: Any = None, **over: Any
) -> Recipe:
    """A recipe in `folder` on `rows`. Its model has a tokenizer and no weights: to load it would be another error."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (tokenizer or tokenizer_of(CHATML)).save_pretrained(model)
    raw: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(model)},
        "data": {"datasets": [{"path": str(write_rows(folder / "rows.jsonl", rows))}], "max_length": 128},
        "train": {"use_cpu": True},
    }
    if stage == "ppo":
        (folder / "rewards.py").write_text("def one(*, prompts, replies, extras):\n    return [1.0 for _ in replies]\n")
        raw["ppo"] = {"rewards": [{"function": f"{folder / 'rewards.py'}:one"}]}
    return STAGES[stage].model_validate(merge(raw, over))  # type: ignore[return-value]


def problem_found(recipe: Recipe) -> ChatalignError | None:
    """The first problem that ``chatalign check`` names."""
    for finding in check_recipe(recipe):
        if finding.problem is not None:
            return finding.problem
    last = tokenizer_finding(recipe)
    return last.problem if last is not None else None


def launch(recipe: Recipe) -> None:
    """What a launch does."""
    refuse_first(recipe)
    run_stage(recipe)


def refusal(recipe: Recipe) -> ChatalignError:
    """The error of a launch, which ``chatalign check`` must have named in the same words."""
    problem = problem_found(recipe)
    assert problem is not None, "chatalign check finds nothing wrong"
    with pytest.raises(ChatalignError) as raised:
        launch(recipe)
    assert (type(raised.value), str(raised.value)) == (type(problem), str(problem))
    return raised.value


def refused(recipe: Recipe, words: str) -> None:
    """A launch says something with `words` in it: for variants of a failure that the page words otherwise."""
    with pytest.raises(ChatalignError) as raised:
        launch(recipe)
    assert words in str(raised.value), str(raised.value)
    assert "\n" not in str(raised.value)
