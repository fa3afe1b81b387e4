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
        console.print(_evaluation(models))
    if reward_model := summary.get("reward_model"):
        console.print(reward_model_line(reward_model), highlight=False, markup=False)
    if samples := summary.get("samples"):
        console.print(_replies(samples, list(models or samples[0]["replies"])))


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


def _evaluation(models: Mapping[str, Mapping[str, Any]]) -> Table:
    prompts = max((row.get("n", 0) for row in models.values()), default=0)
    table = Table(title=Text(f"held-out evaluation · {prompts} prompts", style="bold"), title_justify="left")
    columns = eval_columns(models)
    table.add_column("model")
    for column in columns:
        table.add_column(column.heading, justify="right")
    best = {column.key: best_models(column, models) for column in columns}
    for name, row in models.items():
        cells = [Text(cell(column, row), style="bold green" if name in best[column.key] else "") for column in columns]
        table.add_row(Text(name, style="bold"), *cells)
    return table


def _replies(samples: list[Mapping[str, Any]], names: list[str]) -> Table:
    table = Table(title=Text("replies to the same prompts", style="bold"), title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    for name in names:
        table.add_column(name, ratio=2)
    for sample in samples:
        replies = sample["replies"]
        table.add_row(Text(sample["prompt"], style="dim"), *(Text(replies.get(name, "–")) for name in names))
    return table
