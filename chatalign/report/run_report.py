"""``report.md`` of one run: what came out, from what, with which settings, and how it went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from chatalign.artifact import Artifact, load_artifact
from chatalign.errors import DependencyError
from chatalign.metrics_file import METRICS_FILE, read_metrics
from chatalign.report.headline import duration, headline
from chatalign.report.plots import run_plots

REPORT_FILE = "report.md"
PLOTS_FOLDER = "plots"


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
        _section("How it went", _pictures(pictures) or note),
        _section("Metrics", _metrics(artifact)),
        _section("Data", _data(artifact)),
        _section("Lineage", _lineage(artifact)),
        _section("Recipe", f"```yaml\n{yaml.safe_dump(artifact.recipe, sort_keys=False, allow_unicode=True)}```"),
        _section("Versions", ", ".join(f"{name} {version}" for name, version in artifact.versions.items())),
    ]
    path = folder / REPORT_FILE
    path.write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")
    return path


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; pipes and line breaks inside cells are escaped. Empty without rows."""
    lines = ["| " + " | ".join(_escape(value) for value in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines])


def _escape(value: Any) -> str:
    """A cell's text, shown as it is: replies may hold Markdown, HTML or leaked special tokens."""
    text = str(value)
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(character, escaped)
    return text


def _write_plots(folder: Path) -> tuple[list[str], str]:
    """The names of the plots written, and a line that says why where there is none."""
    try:
        pictures = run_plots(read_metrics(folder / METRICS_FILE))
    except DependencyError as error:
        return [], f"*{error}*"
    for name, picture in pictures.items():
        path = folder / PLOTS_FOLDER / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture)
    return list(pictures), ""


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


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
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in artifact.seeds.items()) or "–"),
        ("fingerprint", _short(artifact.fingerprint)),
    ]
    return markdown_table(("", ""), rows)


def _metrics(artifact: Artifact) -> str:
    return markdown_table(("metric", "value"), [(name, f"{value:.6g}") for name, value in artifact.metrics.items()])


def _data(artifact: Artifact) -> str:
    rows = [
        (
            used.path,
            used.format,
            f"{used.rows:,}",
            f"{used.used:,}",
            ", ".join(f"{count} {reason}" for reason, count in used.dropped.items()) or "none",
            _short(used.sha256),
        )
        for used in artifact.data
    ]
    return markdown_table(("source", "format", "rows", "used", "dropped", "sha256"), rows)


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


def _short(digest: str | None) -> str:
    """The first twelve hex digits: enough to tell two runs apart."""
    return digest[:12] if digest else "–"
