"""Which numbers matter, what they are called, and how they are written: one place for every report and table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# What is shown for a stage: names, each with the metrics of which the artifact's first is taken, held-out ones first.
STAGE_HEADLINES: dict[str, dict[str, tuple[str, ...]]] = {
    "pretrain": {"loss": ("eval_loss", "loss")},
    "sft": {"loss": ("eval_loss", "loss")},
    "reward": {"accuracy": ("eval_accuracy", "accuracy")},
    "dpo": {
        "accuracy": ("eval_rewards/accuracies", "rewards/accuracies"),
        "margin": ("eval_rewards/margins", "rewards/margins"),
    },
    "kto": {"margin": ("eval_rewards/margins", "rewards/margins"), "loss": ("eval_loss", "loss")},
    "ppo": {"score": ("eval_objective/score", "objective/score"), "KL": ("eval_objective/kl", "objective/kl")},
}


class Column(NamedTuple):
    """A column of the evaluation table: key in eval.json, heading, format, and which value is best."""

    key: str
    heading: str
    form: str
    best: str = ""  # "high" or "low": the best value is set in bold


# The weightiest first: a narrow terminal shows as many as it takes.
EVAL_COLUMNS: tuple[Column, ...] = (
    Column("win_rate", "win rate", ".3f", "high"),
    Column("gold_mean", "gold", ".3f", "high"),
    Column("accuracy", "accuracy", ".3f", "high"),
    Column("format_rate", "format", ".3f", "high"),
    Column("kl", "KL", ".2f"),
    # No best among the reward model's own: the more a policy over-optimises it, the higher they are.
    Column("rm_score", "RM score", ".3f"),
    Column("rm_win_rate", "RM win rate", ".3f"),
    Column("ended_rate", "ended", ".3f"),
    Column("length", "tokens", ".1f"),
    Column("perplexity", "perplexity", ".2f", "low"),
    Column("bleu", "BLEU", ".1f", "high"),
    Column("rougeL", "ROUGE-L", ".3f", "high"),
    Column("exact_match", "exact", ".3f", "high"),
)


def headline(stage: str, metrics: Mapping[str, Any]) -> str:
    """What matters of a stage's metrics, as ``held-out loss 0.512``, or a dash; of an evaluation its best win rate."""
    if stage == "eval":
        rates = {name: value for name, value in metrics.items() if name.endswith(".win_rate")}
        best = max(rates, key=lambda name: rates[name], default=None)
        return f"{best.removesuffix('.win_rate')} wins {rates[best]:.3f}" if best else "–"
    shown = []
    for label, names in STAGE_HEADLINES.get(stage, {}).items():
        name = next((name for name in names if _is_number(metrics.get(name))), None)
        if name is not None:
            shown.append((name.startswith("eval_"), f"{label} {metrics[name]:.3f}"))
    if not shown:
        return "–"
    prefix = "held-out " if all(held_out for held_out, _ in shown) else ""
    return prefix + ", ".join(text for _, text in shown)


def eval_columns(models: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """The columns for which at least one model has a number, in their order."""
    return [column for column in EVAL_COLUMNS if any(_is_number(row.get(column.key)) for row in models.values())]


def cell(column: Column, row: Mapping[str, Any]) -> str:
    """One number as text, a win rate with its confidence interval; a dash where it wasn't measured."""
    value = row.get(column.key)
    if not _is_number(value):
        return "–"
    interval = row.get("win_rate_ci") if column.key == "win_rate" else None
    return format(value, column.form) + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def best_models(column: Column, models: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The models with the best value of a column; none where better has no meaning or there is no choice."""
    values = {name: row[column.key] for name, row in models.items() if _is_number(row.get(column.key))}
    if not column.best or len(values) < 2:
        return set()
    best = max(values.values()) if column.best == "high" else min(values.values())
    return {name for name, value in values.items() if value == best}


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``8.2 s``, ``3 min 05 s``, ``2 h 04 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
