"""A pipeline's ``report.md`` and its self-contained ``report.html``: results, stages, plots, replies, lineage."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from chatalign.artifact import Artifact, load_artifact
from chatalign.errors import ArtifactError, DependencyError
from chatalign.metrics_file import METRICS_FILE, read_metrics
from chatalign.report import plots
from chatalign.report.headline import best_models, cell, duration, eval_columns, headline
from chatalign.report.run_report import PLOTS_FOLDER, REPORT_FILE, markdown_table
from chatalign.report.terminal import reward_model_line

HTML_FILE = "report.html"
_LOSSES = ("loss", "loss/policy_avg")
_REWARDS = ("objective/scores", "objective/score", "rewards/accuracies", "accuracy", "rewards/margins")
_KLS = ("objective/kl", "kl")


def write_pipeline_report(folder: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``report.md``, ``report.html`` and ``plots/`` into a pipeline's folder; returns the HTML's path.

    `summary` is what ``summary.json`` holds. Metrics and lineage are read from the stage folders below `folder`;
    a stage without them is shown by its summary alone. Without matplotlib the reports say so in the plots' place.
    """
    folder = Path(folder)
    pictures, note = _pictures(folder, summary)
    for name, (_, light, _) in pictures.items():
        path = folder / PLOTS_FOLDER / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(light)
    view = _view(folder, summary) | {"note": note}
    (folder / REPORT_FILE).write_text(
        _markdown(view, {name: title for name, (title, _, _) in pictures.items()}), "utf-8"
    )
    html = _html(view, [(title, _inline(light), _inline(dark)) for title, light, dark in pictures.values()])
    (folder / HTML_FILE).write_text(html, "utf-8")
    return folder / HTML_FILE


def _pictures(folder: Path, summary: Mapping[str, Any]) -> tuple[dict[str, tuple[str, bytes, bytes]], str]:
    """Name → (title, light PNG, dark PNG), and a line that says why where there is none."""
    stages = {stage["name"]: read_metrics(folder / stage["name"] / METRICS_FILE) for stage in summary["stages"]}
    models = summary.get("eval", {})
    baseline = baseline_of(models)
    drawings: dict[str, tuple[str, Callable[[bool], bytes | None]]] = {
        "win_rates": ("Win rates", lambda dark: plots.win_rates(models, baseline, dark=dark)),
        "reward_kl": ("Reward against KL", lambda dark: plots.reward_against_kl(models, baseline, dark=dark)),
        "loss": ("Loss, stage by stage", lambda dark: plots.stage_curves(stages, _LOSSES, "loss", dark=dark)),
        "reward": ("Reward and accuracy", lambda dark: plots.stage_curves(stages, _REWARDS, "", dark=dark)),
        "kl": ("KL to the reference", lambda dark: plots.stage_curves(stages, _KLS, "nats a reply", dark=dark)),
    }
    pictures = {}
    try:
        for name, (title, draw) in drawings.items():
            light, dark = draw(False), draw(True)
            if light is not None and dark is not None:
                pictures[name] = (title, light, dark)
    except DependencyError as error:
        return {}, str(error)
    return pictures, ""


def baseline_of(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The model that others were held to: eval.json marks it; `baseline` where it doesn't."""
    return next((name for name, row in models.items() if row.get("baseline") is True), "baseline")


def _view(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that both reports show, as text."""
    models: Mapping[str, Mapping[str, Any]] = summary.get("eval", {})
    columns = eval_columns(models)
    best = [best_models(column, models) for column in columns]
    artifacts = {stage["name"]: artifact for stage in summary["stages"] if (artifact := _artifact(folder, stage))}
    return {
        "pipeline": summary["pipeline"],
        "wall": duration(summary.get("wall_s", 0.0)),
        "stages": [
            {
                **stage,
                "time": duration(stage.get("wall_s", 0.0)),
                "speed": f"{stage['tokens_per_s']:,.0f}" if stage.get("tokens_per_s") else "–",
                "result": headline(stage["stage"], stage.get("metrics", {})),
            }
            for stage in summary["stages"]
        ],
        "headings": [column.heading for column in columns],
        "models": [
            (name, [(cell(column, row), name in winners) for column, winners in zip(columns, best, strict=True)])
            for name, row in models.items()
        ],
        "baseline": baseline_of(models),
        "n": max((row.get("n", 0) for row in models.values()), default=0),
        "reward_model": reward_model_line(summary["reward_model"]) if summary.get("reward_model") else "",
        "names": list(models) or sorted({name for sample in summary.get("samples", []) for name in sample["replies"]}),
        "samples": summary.get("samples", []),
        "lineage": [_lineage(name, artifact) for name, artifact in artifacts.items()],
        "data": [(name, used) for name, artifact in artifacts.items() for used in artifact.data],
        "versions": summary.get("versions", {}),
    }


def _artifact(folder: Path, stage: Mapping[str, Any]) -> Artifact | None:
    try:
        return load_artifact(folder / stage["name"])
    except ArtifactError:
        return None  # moved or deleted since: the summary still names it


def _lineage(name: str, artifact: Artifact) -> dict[str, str]:
    base = artifact.base_model
    weights = [digest for path, digest in artifact.files.items() if path.endswith(".safetensors")]
    return {
        "name": name,
        "run": artifact.run_id,
        "from": ", ".join(f"{parent.role}: {Path(parent.path).name} ({parent.run_id})" for parent in artifact.parents)
        or "–",
        "base": f"{base.name_or_path} {(base.sha256 or base.revision or '')[:12]}".strip() if base else "–",
        "weights": weights[0][:12] if weights else "–",
        "fingerprint": artifact.fingerprint[:12],
    }


def _markdown(view: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The report as Markdown, plots beside it."""
    bold = lambda text, wins: f"**{text}**" if wins else text  # noqa: E731
    models = [(name, *(bold(text, wins) for text, wins in cells)) for name, cells in view["models"]]
    stages = [
        (stage["name"], stage["stage"], stage["status"], stage["time"], stage["speed"], stage["result"])
        for stage in view["stages"]
    ]
    replies = [
        (sample["prompt"], *(sample["replies"].get(name, "–") for name in view["names"])) for sample in view["samples"]
    ]
    data = [
        (name, used.path, used.rows, used.used, sum(used.dropped.values()), used.sha256[:12])
        for name, used in view["data"]
    ]
    sections = {
        f"Results on {view['n']} held-out prompts, against {view['baseline']}": markdown_table(
            ("model", *view["headings"]), models
        )
        + (f"\n\n{view['reward_model']}" if view["reward_model"] else ""),
        "Stages": markdown_table(("stage", "kind", "status", "time", "tokens/s", "result"), stages),
        "Plots": "\n".join(f"![{title}]({PLOTS_FOLDER}/{name}.png)" for name, title in pictures.items())
        or (f"*{view['note']}*" if view["note"] else ""),
        "Replies to the same prompts": markdown_table(("prompt", *view["names"]), replies),
        "Lineage": markdown_table(
            ("stage", "run", "from", "base", "weights", "fingerprint"), [tuple(row.values()) for row in view["lineage"]]
        ),
        "Data": markdown_table(("stage", "source", "rows", "used", "dropped", "sha256"), data),
        "Versions": ", ".join(f"{name} {version}" for name, version in view["versions"].items()),
    }
    body = [f"## {title}\n\n{text}" for title, text in sections.items() if text.strip()]
    return "\n\n".join([f"# {view['pipeline']}", f"{len(stages)} stages in {view['wall']}.", *body]) + "\n"


def _html(view: Mapping[str, Any], pictures: list[tuple[str, str, str]]) -> str:
    from jinja2 import Environment

    template = files("chatalign.report").joinpath("pipeline.html.j2").read_text("utf-8")
    # Replies are what a model wrote: escaped, whatever they hold.
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(**view, pictures=pictures)
    )


def _inline(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
