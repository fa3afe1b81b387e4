"""Which numbers matter, what they are called, and how they are written: one place for every report and table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# What is shown for a stage: of each group the first that its artifact holds.
STAGE_HEADLINES: dict[str, tuple[tuple[str, ...], ...]] = {
    "pretrain": (("eval_loss", "loss"),),
    "sft": (("eval_loss", "loss"),),
    "reward": (("eval_accuracy", "accuracy"),),
    "dpo": (("eval_rewards/accuracies", "rewards/accuracies"), ("eval_rewards/margins", "rewards/margins")),
    "kto": (("eval_rewards/margins", "rewards/margins"), ("eval_loss", "loss")),
    "ppo": (("eval_objective/score", "objective/score"), ("eval_objective/kl", "objective/kl")),
}


class Column(NamedTuple):
    """A column of the evaluation table: key in eval.json, heading, format, and whether more is better."""

    key: str
    heading: str
    form: str
    best: str = ""  # "high" or "low": the best value is set in bold


EVAL_COLUMNS: tuple[Column, ...] = (
    Column("win_rate", "win rate", ".3f", "high"),
    Column("gold_mean", "gold", ".3f", "high"),
    # No best among the reward model's own: the more a policy over-optimises it, the higher they are.
    Column("rm_win_rate", "RM win rate", ".3f"),
    Column("rm_score", "RM score", ".3f"),
    Column("kl", "KL (nats)", ".2f"),
    Column("accuracy", "accuracy", ".3f", "high"),
    Column("format_rate", "format", ".3f", "high"),
    Column("ended_rate", "ended", ".3f"),
    Column("length", "tokens", ".1f"),
    Column("perplexity", "perplexity", ".2f", "low"),
    Column("bleu", "BLEU", ".1f", "high"),
    Column("rougeL", "ROUGE-L", ".3f", "high"),
    Column("exact_match", "exact", ".3f", "high"),
)


def headline(stage: str, metrics: Mapping[str, Any]) -> str:
    """``name value`` of what matters for a stage, or a dash; of an evaluation it is the best win rate."""
    if stage == "eval":
        rates = {name: value for name, value in metrics.items() if name.endswith(".win_rate")}
        best = max(rates, key=lambda name: rates[name], default=None)
        return f"{best} {rates[best]:.3f}" if best else "–"
    shown = []
    for group in STAGE_HEADLINES.get(stage, ()):
        name = next((name for name in group if _is_number(metrics.get(name))), None)
        if name is not None:
            shown.append(f"{name} {metrics[name]:.3f}")
    return " · ".join(shown) or "–"


def eval_columns(models: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """The columns for which at least one model has a number, in their order."""
    return [column for column in EVAL_COLUMNS if any(_is_number(row.get(column.key)) for row in models.values())]


def cell(column: Column, row: Mapping[str, Any]) -> str:
    """One number as text, with its confidence interval where there is one; a dash where it wasn't measured."""
    value = row.get(column.key)
    if not _is_number(value):
        return "–"
    text = format(value, column.form)
    interval = row.get(f"{column.key}_ci")
    if interval:
        text += f" [{interval[0]:{column.form}}, {interval[1]:{column.form}}]"
    return text


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
