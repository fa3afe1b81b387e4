"""What an evaluation says: eval.json, a line a prompt in replies.jsonl, and the artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatalign.artifact import Artifact, sha256_file, write_json
from chatalign.evaluate.compare import INTERVALS, gain, means, win_rate
from chatalign.evaluate.heldout import HeldOut, shown
from chatalign.evaluate.metrics import text_metrics
from chatalign.evaluate.policy import Answers
from chatalign.metrics_file import plain
from chatalign.recipe import EvalRecipe
from chatalign.runs import Run

EVAL_FILE = "eval.json"
REPLIES_FILE = "replies.jsonl"


@dataclass(kw_only=True)
class Measured:
    """What one model did; filled step by step."""

    answers: Answers | None = None
    tokenizer: Any = None
    logps: list[float] = field(default_factory=list)
    reference_logps: list[float] | None = None  # None: the baseline's tokenizer is another
    gold: list[dict[str, float]] = field(default_factory=list)
    rm_scores: list[float] = field(default_factory=list)
    perplexity: float | None = None
    seconds: float = 0.0


def summarise(recipe: EvalRecipe, held_out: HeldOut, measured: Mapping[str, Measured], baseline: str) -> dict[str, Any]:
    """What eval.json holds, but for the reward model's own accuracy."""
    rows = {name: _row(recipe, held_out, one, measured[baseline]) for name, one in measured.items()}
    if baseline in rows:
        rows[baseline]["baseline"] = True
    return {
        "models": rows,
        "baseline": baseline,
        "intervals": INTERVALS,
        "settings": recipe.eval.model_dump(mode="json"),
        "samples": _samples(held_out, measured, recipe.eval.samples),
    }


def _row(recipe: EvalRecipe, held_out: HeldOut, one: Measured, base: Measured) -> dict[str, Any]:
    """One model's numbers; only what was measured is there."""
    row: dict[str, Any] = {"n": len(held_out.questions)}
    if one.perplexity is not None:
        row["perplexity"] = one.perplexity
    if one.answers is None:
        return row
    lengths = [len(ids) for ids in one.answers.response_ids]
    row["length"] = sum(lengths) / len(lengths)
    row["ended_rate"] = sum(one.answers.ended) / len(lengths)
    if one.gold:
        row |= _gold_row(one, base)
    if one.rm_scores:
        row["rm_score"] = sum(one.rm_scores) / len(one.rm_scores)
        if one is not base:
            row["rm_win_rate"], row["rm_win_rate_ci"] = win_rate(one.rm_scores, base.rm_scores)
    if one.reference_logps is not None:
        row["kl"], row["kl_ci"] = gain(one.logps, one.reference_logps)
    row |= text_metrics(
        recipe.eval.metrics, one.answers.texts, [question.references for question in held_out.questions]
    )
    return row


def _gold_row(one: Measured, base: Measured) -> dict[str, Any]:
    parts = means(one.gold)
    row: dict[str, Any] = {"gold_mean": parts.pop("gold")}
    row["win_rate"], row["win_rate_ci"] = None, None  # of the baseline against itself
    if one is not base:
        ours, theirs = ([scores["gold"] for scores in side.gold] for side in (one, base))
        row["win_rate"], row["win_rate_ci"] = win_rate(ours, theirs)
        row["gold_gain"], row["gold_gain_ci"] = gain(ours, theirs)
    if "format" in parts:
        row["format_rate"] = parts.pop("format")
    if "correct" in parts:
        row["accuracy"] = parts.pop("correct")
    return row | {"gold_parts": parts}


def _samples(held_out: HeldOut, measured: Mapping[str, Measured], count: int) -> list[dict[str, Any]]:
    """Replies of all models to `count` prompts spread evenly over the held-out rows."""
    questions = held_out.questions
    count = min(count, len(questions))
    chosen = [place * len(questions) // count for place in range(count)]
    return [
        {
            "prompt": shown(questions[i].messages),
            "replies": {name: one.answers.texts[i] for name, one in measured.items() if one.answers},
        }
        for i in chosen
    ]


def write(
    recipe: EvalRecipe,
    run: Run,
    held_out: HeldOut,
    measured: Mapping[str, Measured],
    results: Mapping[str, Any],
    *,
    wall_s: float,
) -> Artifact:
    """Write the results and, last, the artifact."""
    write_json(run.folder / EVAL_FILE, plain(results))
    lines = [json.dumps(plain(line), ensure_ascii=False) + "\n" for line in _lines(held_out, measured)]
    (run.folder / REPLIES_FILE).write_text("".join(lines), "utf-8")
    tokens = {name: sum(map(len, one.answers.response_ids)) for name, one in measured.items() if one.answers}
    speeds = {name: count / measured[name].seconds for name, count in tokens.items() if measured[name].seconds}
    seconds = sum(one.seconds for one in measured.values())
    artifact = Artifact(
        stage="eval",
        kind="evaluation",
        run_id=run.run_id,
        fingerprint=run.fingerprint,
        parents=run.parents,
        recipe=recipe.model_dump(mode="json"),
        data=held_out.data,
        seeds={"seed": recipe.eval.seed},
        metrics=flat_metrics(results),
        extra={"generated_tokens_per_s": speeds},
        wall_s=wall_s,
        tokens_seen=sum(tokens.values()),
        tokens_per_s=sum(tokens.values()) / seconds if seconds else 0.0,
        files={name: sha256_file(run.folder / name) for name in (EVAL_FILE, REPLIES_FILE)},
    )
    artifact.save(run.folder)
    return artifact


def flat_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """``{model}.{number}`` for every finite number of eval.json, and ``reward_model.{number}``."""
    rows = {**results["models"], "reward_model": results["reward_model"]}
    return {
        f"{name}.{key}": float(value)
        for name, row in rows.items()
        for key, value in plain(row).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _lines(held_out: HeldOut, measured: Mapping[str, Measured]) -> Sequence[dict[str, Any]]:
    """A line a prompt: the row, and each model's reply with its scores."""
    return [
        {"row": question.row, "replies": {name: _reply(one, i) for name, one in measured.items() if one.answers}}
        for i, question in enumerate(held_out.questions)
    ]


def _reply(one: Measured, i: int) -> dict[str, Any]:
    assert one.answers is not None
    reply: dict[str, Any] = {
        "text": one.answers.texts[i],
        "ended": one.answers.ended[i],
        "tokens": len(one.answers.response_ids[i]),
        "logp": one.logps[i],
    }
    if one.reference_logps is not None:
        reply["reference_logp"] = one.reference_logps[i]
    if one.gold:
        reply |= {"gold": one.gold[i]["gold"], "gold_parts": one.gold[i]}
    if one.rm_scores:
        reply["rm_score"] = one.rm_scores[i]
    return reply
