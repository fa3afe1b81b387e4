"""``report.md`` of one run: what came out, from what, with which settings, and how it went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from chatalign.artifact import Artifact, load_artifact, write_whole
from chatalign.changes import shown
from chatalign.errors import DependencyError
from chatalign.metrics_file import METRICS_FILE, read_metrics
from chatalign.report.headline import duration, headline
from chatalign.report.markdown import baseline_of, evaluation_sections, markdown_table, section
from chatalign.report.plots import light_png, reward_against_kl, run_plots, win_rates

REPORT_FILE = "report.md"
PLOTS_FOLDER = "plots"
EVAL_FILE = "eval.json"


def write_run_report(folder: str | Path) -> Path:
    """Write ``report.md`` and ``plots/*.png`` into a finished run's folder; returns the report's path.

    Without matplotlib the report says so in the plots' place. Raises ArtifactError where the run isn't finished.
    """
    folder = Path(folder)
    artifact = load_artifact(folder)
    pictures, note = _write_plots(folder)
    parts = [
        f"# {artifact.stage} run `{artifact.run_id}`",
        _facts(artifact),
        *_evaluation(folder),
        section("How it went", _pictures(pictures) or note),
        section("Metrics", _metrics(artifact) if artifact.kind != "evaluation" else ""),
        section("Data", _data(artifact)),
        section("Lineage", _lineage(artifact)),
        section("Changed while it was unfinished", _changes(artifact)),
        section("Recipe", f"```yaml\n{yaml.safe_dump(artifact.recipe, sort_keys=False, allow_unicode=True)}```"),
        section("Versions", ", ".join(f"{name} {version}" for name, version in artifact.versions.items())),
    ]
    path = folder / REPORT_FILE
    return write_whole(path, "\n\n".join(part for part in parts if part) + "\n")


def _evaluation(folder: Path) -> list[str]:
    """Results and replies, where the run is an evaluation."""
    results = read_evaluation(folder)
    return evaluation_sections(results["models"], results["reward_model"], results["samples"]) if results else []


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What ``eval.json`` of a run folder holds; empty where there is none."""
    path = folder / EVAL_FILE
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _write_plots(folder: Path) -> tuple[list[str], str]:
    """The names of the plots written, and a line that says why where there is none."""
    models = read_evaluation(folder).get("models", {})
    try:
        pictures = run_plots(read_metrics(folder / METRICS_FILE))
        for name, figure in (
            ("win_rates", win_rates(models, baseline_of(models))),
            ("reward_kl", reward_against_kl(models, baseline_of(models))),
        ):
            if figure is not None:
                pictures[name] = light_png(figure)
    except DependencyError as error:
        return [], f"*{error}*"
    for name, picture in pictures.items():
        path = folder / PLOTS_FOLDER / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture)
    return list(pictures), ""


def _pictures(names: Sequence[str]) -> str:
    return "\n".join(f"![{name.replace('_', ' ')}]({PLOTS_FOLDER}/{name}.png)" for name in names)


def _facts(artifact: Artifact) -> str:
    base = artifact.base_model
    rows = [
        ("kind", artifact.kind.replace("_", " ")),
        ("result", headline(artifact.stage, artifact.metrics)),
        ("base model", f"{base.name_or_path} ({base.revision or _short(base.sha256)})" if base else "–"),
        ("time", duration(artifact.wall_s)),
        ("tokens", f"{artifact.tokens_seen:,} ({artifact.tokens_per_s:,.0f} a second)"),
        ("ran with", str(artifact.extra.get("ran_with", "–"))),
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in artifact.seeds.items()) or "–"),
        ("fingerprint", _short(artifact.fingerprint)),
    ]
    return markdown_table(("", ""), rows)


def _metrics(artifact: Artifact) -> str:
    return markdown_table(("metric", "value"), [(name, f"{value:.6g}") for name, value in artifact.metrics.items()])


def _data(artifact: Artifact) -> str:
    sources = [
        (
            used.path,
            used.format,
            f"{used.rows:,}",
            f"{used.used:,}",
            f"{sum(used.dropped.values()):,}",
            _short(used.sha256),
        )
        for used in artifact.data
    ]
    table = markdown_table(("source", "format", "rows", "used", "dropped", "sha256"), sources)
    return "\n\n".join(part for part in (table, _dropped(artifact)) if part)


def _dropped(artifact: Artifact) -> str:
    """Why rows were left out, how many for each reason, and where the first of them stand."""
    rows = [
        (used.path, reason, f"{count:,}", ", ".join(used.examples.get(reason, [])) or "–")
        for used in artifact.data
        for reason, count in used.dropped.items()
    ]
    return markdown_table(("source", "dropped because", "rows", "first at"), rows)


def _lineage(artifact: Artifact) -> str:
    parents = [(parent.role, parent.path, parent.run_id, _short(parent.fingerprint)) for parent in artifact.parents]
    table = markdown_table(("taken as", "run folder", "run", "fingerprint"), parents)
    hashes = [
        (name, _short(value))
        for name, value in (
            ("tokenizer", artifact.tokenizer_sha256),
            ("chat template", artifact.chat_template_sha256),
            *artifact.files.items(),
        )
        if value
    ]
    return "\n\n".join(part for part in (table, markdown_table(("file", "sha256"), hashes)) if part)


def _changes(artifact: Artifact) -> str:
    """What was changed by name while the run was unfinished, and at which step it went on with it."""
    changes = artifact.extra.get("changes", [])
    rows = [(f"`{c['key']}`", shown(c["before"]), shown(c["now"]), c["step"]) for c in changes]
    return markdown_table(("key", "before", "afterwards", "from step"), rows)


def _short(digest: str | None) -> str:
    """The first twelve hex digits: enough to tell two runs apart."""
    return digest[:12] if digest else "–"
