"""A pipeline's result as tables in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chatalign.report.headline import best_models, cell, duration, eval_columns, headline

_READABLE = 24  # characters that a column of replies needs


def print_pipeline_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print stages, evaluation, reward model and replies side by side, from what ``summary.json`` holds."""
    console.print(_stages(summary))
    _print_results(summary, console)


def print_evaluation(folder: str | Path, console: Console) -> None:
    """Print the tables of one evaluation run, from its ``eval.json``; nothing where the folder has none."""
    path = Path(folder) / "eval.json"
    if path.is_file():
        results = json.loads(path.read_text("utf-8"))
        _print_results({**results, "eval": results["models"]}, console)


def _print_results(summary: Mapping[str, Any], console: Console) -> None:
    if models := summary.get("eval"):
        console.print(_evaluation(models, console.width))
    if reward_model := summary.get("reward_model"):
        console.print(reward_model_line(reward_model), highlight=False, markup=False)
    if samples := summary.get("samples"):
        console.print(_replies(samples, list(models or samples[0]["replies"]), console.width))


def reward_model_line(reward_model: Mapping[str, Any]) -> str:
    """``reward model: accuracy 0.81 on 900 pairs (style 0.95, correctness 0.70)``."""
    parts = [
        f"{name.removesuffix('_accuracy')} {value:.3f}"
        for name, value in reward_model.items()
        if name.endswith("_accuracy") and isinstance(value, int | float)
    ]
    accuracy = reward_model.get("accuracy")
    shown = f"{accuracy:.3f}" if isinstance(accuracy, int | float) else "not measured"
    return f"reward model: accuracy {shown} on {reward_model.get('n', 0)} held-out pairs" + (
        f" ({', '.join(parts)})" if parts else ""
    )


def _stages(summary: Mapping[str, Any]) -> Table:
    title = Text(f"{summary['pipeline']} · {duration(summary.get('wall_s', 0.0))}", style="bold")
    table = Table(title=title, title_justify="left")
    for heading in ("stage", "kind", "status"):
        table.add_column(heading)
    for heading in ("time", "tokens/s"):
        table.add_column(heading, justify="right")
    table.add_column("result")
    for stage in summary["stages"]:
        speed = stage.get("tokens_per_s") or 0.0
        table.add_row(
            Text(stage["name"], style="bold"),
            stage["stage"],
            Text(stage["status"], style="dim" if stage["status"] == "skipped" else "green"),
            duration(stage.get("wall_s", 0.0)),
            f"{speed:,.0f}" if speed else "–",
            Text(headline(stage["stage"], stage.get("metrics", {}))),
        )
    return table


def _evaluation(models: Mapping[str, Mapping[str, Any]], width: int) -> Table:
    """The evaluation table, with as many columns as `width` characters take whole; the report has them all."""
    prompts = max((row.get("n", 0) for row in models.values()), default=0)
    table = Table(title=Text(f"held-out evaluation · {prompts} prompts", style="bold"), title_justify="left")
    table.add_column("model", overflow="fold")
    left = width - max(map(len, models)) - 4
    shown = []
    for column in eval_columns(models):
        left -= max(len(column.heading), *(len(cell(column, row)) for row in models.values())) + 3
        if left < 0:
            break
        shown.append((column, best_models(column, models)))
        table.add_column(column.heading, justify="right", no_wrap=True)
    for name, row in models.items():
        cells = [Text(cell(column, row), style="bold green" if name in best else "") for column, best in shown]
        table.add_row(Text(name, style="bold"), *cells)
    return table


def _replies(samples: list[Mapping[str, Any]], names: list[str], width: int) -> Table:
    """Replies side by side where a column has room for a sentence, else one below the other."""
    side_by_side = width >= _READABLE * (len(names) + 1)
    table = Table(
        title=Text("replies to the same prompts", style="bold"), title_justify="left", show_lines=side_by_side
    )
    if side_by_side:
        table.add_column("prompt", ratio=1, overflow="fold")
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        for sample in samples:
            replies = [Text(sample["replies"].get(name, "–")) for name in names]
            table.add_row(Text(sample["prompt"], style="dim"), *replies)
        return table
    table.add_column("model")
    table.add_column("reply", ratio=1, overflow="fold")  # Chinese has no spaces to break at
    for sample in samples:
        table.add_row(Text("prompt", style="dim"), Text(sample["prompt"], style="dim"))
        for name in names:
            last = name == names[-1]
            table.add_row(Text(name, style="bold"), Text(sample["replies"].get(name, "–")), end_section=last)
    return table
