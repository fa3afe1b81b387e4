"""A pipeline's ``report.md`` and its self-contained ``report.html``: results, stages, plots, replies, lineage."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chatalign.artifact import Artifact, load_artifact
from chatalign.errors import ArtifactError, DependencyError
from chatalign.metrics_file import METRICS_FILE, read_metrics
from chatalign.report import plots
from chatalign.report.headline import best_models, cell, duration, eval_columns, headline
from chatalign.report.lineage import lineage_of, mermaid, svg
from chatalign.report.markdown import baseline_of, evaluation_sections, markdown_table, section
from chatalign.report.page import render_page
from chatalign.report.run_report import PLOTS_FOLDER, REPORT_FILE
from chatalign.report.terminal import reward_model_line

HTML_FILE = "report.html"
_LOSSES = ("loss",)
_REWARDS = ("objective/score", "rewards/accuracies", "accuracy")
_KLS = ("objective/kl",)


def write_pipeline_report(folder: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``report.md``, ``report.html`` and ``plots/`` into a pipeline's folder; returns the HTML's path.

    `summary` is what ``summary.json`` holds. Metrics and lineage are read from the stage folders below `folder`;
    a stage without them is shown by its summary alone. Without matplotlib the reports say so in the plots' place.
    """
    folder = Path(folder)
    pictures, note = _pictures(folder, summary)
    for picture in pictures:
        path = folder / PLOTS_FOLDER / f"{picture.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.light)
    view = _view(folder, summary) | {"note": note, "pictures": pictures}
    (folder / REPORT_FILE).write_text(_markdown(summary, view), "utf-8")
    (folder / HTML_FILE).write_text(_html(view), "utf-8")
    return folder / HTML_FILE


class _Picture(NamedTuple):
    """A plot for light and for dark pages; `width` is what it takes for all plots' texts to be of one size."""

    name: str
    title: str
    light: bytes
    dark: bytes

    @property
    def width(self) -> int:
        """CSS pixels: three fifths of the PNG's own, which its header holds in bytes 16 to 19."""
        return int.from_bytes(self.light[16:20]) * 3 // 5


def _pictures(folder: Path, summary: Mapping[str, Any]) -> tuple[list[_Picture], str]:
    """The plots, and a line that says why where there is none."""
    stages = {stage["name"]: read_metrics(folder / stage["name"] / METRICS_FILE) for stage in summary["stages"]}
    models = summary.get("eval", {})
    baseline = baseline_of(models)
    drawings: dict[tuple[str, str], Callable[[], plots.Figure | None]] = {
        ("win_rates", "Win rates"): lambda: plots.win_rates(models, baseline),
        ("reward_kl", "Reward against KL"): lambda: plots.reward_against_kl(models, baseline),
        ("loss", "Loss, stage by stage"): lambda: plots.stage_curves(stages, _LOSSES, "loss"),
        ("reward", "Reward and accuracy"): lambda: plots.stage_curves(stages, _REWARDS, ""),
        ("kl", "KL to the reference"): lambda: plots.stage_curves(stages, _KLS, "nats a reply"),
    }
    pictures = []
    try:
        for (name, title), draw in drawings.items():
            figure = draw()
            if figure is not None:
                pictures.append(_Picture(name, title, plots.light_png(figure), plots.dark_png(figure)))
    except DependencyError as error:
        return [], str(error)
    return pictures, ""


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
                "overhead": duration(stage["overhead_s"]) if stage.get("overhead_s") else "–",
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
        "graph": lineage_of(artifacts),
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


def _markdown(summary: Mapping[str, Any], view: Mapping[str, Any]) -> str:
    """The report as Markdown, plots beside it."""
    stages = [
        tuple(stage[key] for key in ("name", "stage", "status", "time", "overhead", "speed", "result"))
        for stage in view["stages"]
    ]
    headings = ("stage", "kind", "status", "time", "overhead", "tokens/s", "result")
    plots_seen = "\n".join(f"![{plot.title}]({PLOTS_FOLDER}/{plot.name}.png)" for plot in view["pictures"])
    lineage = [tuple(row.values()) for row in view["lineage"]]
    lineage_table = markdown_table(("stage", "run", "from", "base", "weights", "fingerprint"), lineage)
    data = [
        (name, used.path, used.rows, used.used, sum(used.dropped.values()), used.sha256[:12])
        for name, used in view["data"]
    ]
    results, replies = evaluation_sections(
        summary.get("eval", {}), summary.get("reward_model", {}), summary.get("samples", [])
    )
    parts = [
        f"# {view['pipeline']}",
        f"{len(stages)} stages in {view['wall']}.",
        results,
        section("Stages", markdown_table(headings, stages)),
        section("Plots", plots_seen or (f"*{view['note']}*" if view["note"] else "")),
        replies,
        section("Lineage", "\n\n".join((mermaid(view["graph"]), lineage_table)).strip()),
        section("Data", markdown_table(("stage", "source", "rows", "used", "dropped", "sha256"), data)),
        section("Versions", ", ".join(f"{name} {version}" for name, version in view["versions"].items())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _html(view: Mapping[str, Any]) -> str:
    from markupsafe import Markup

    graph = Markup(svg(view["graph"]))  # which escapes what it is made of
    return render_page("pipeline.html.j2", {"inline": _inline}, **dict(view) | {"graph": graph})


def _inline(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
