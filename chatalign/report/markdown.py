"""Pieces of Markdown that several reports share: tables, sections, evaluation results, replies side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chatalign.report.headline import best_models, cell, eval_columns
from chatalign.report.terminal import reward_model_line


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; pipes and line breaks inside cells are escaped. Empty without rows."""
    lines = ["| " + " | ".join(_escape(value) for value in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines])


def _escape(value: Any) -> str:
    """A cell's text, kept from ending the cell or opening a tag: replies may hold anything, leaked tokens too."""
    text = str(value)
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(character, escaped)
    return text


def section(title: str, body: str) -> str:
    """A second-level section; empty without a body."""
    return f"## {title}\n\n{body}" if body.strip() else ""


def baseline_of(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The model that others were held to: eval.json marks it; `baseline` where it doesn't."""
    return next((name for name, row in models.items() if row.get("baseline") is True), "baseline")


def evaluation_sections(
    models: Mapping[str, Mapping[str, Any]], reward_model: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Results and replies of an evaluation, as eval.json holds them; empty strings where there is nothing."""
    columns = eval_columns(models)
    best = [best_models(column, models) for column in columns]
    rows = [
        (
            name,
            *(
                f"**{cell(c, row)}**" if name in winners else cell(c, row)
                for c, winners in zip(columns, best, strict=True)
            ),
        )
        for name, row in models.items()
    ]
    table = markdown_table(("model", *(column.heading for column in columns)), rows)
    line = reward_model_line(reward_model) if reward_model else ""
    prompts = max((row.get("n", 0) for row in models.values()), default=0)
    names = list(models) or sorted({name for sample in samples for name in sample["replies"]})
    replies = [(sample["prompt"], *(sample["replies"].get(name, "–") for name in names)) for sample in samples]
    return [
        section(
            f"Results on {prompts} held-out prompts, against {baseline_of(models)}" if models else "Results",
            "\n\n".join(part for part in (table, line) if part),
        ),
        section("Replies to the same prompts", markdown_table(("prompt", *names), replies)),
    ]
