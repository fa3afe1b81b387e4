"""``chatalign report A B``: two runs, or two pipelines, beside each other: recipes, curves, results, replies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatalign.artifact import Artifact
from chatalign.errors import ArtifactError, DependencyError
from chatalign.metrics_file import METRICS_FILE, read_metrics
from chatalign.report.headline import duration, headline
from chatalign.report.lineage import finished_runs
from chatalign.report.markdown import markdown_table, section
from chatalign.report.plots import compared_curves, light_png
from chatalign.report.run_report import PLOTS_FOLDER, REPORT_FILE, read_evaluation

_NOT_THE_RECIPE = ("output_dir", "run_name")


def write_comparison(one: str | Path, other: str | Path, folder: str | Path) -> Path:
    """Write ``report.md`` and ``plots/`` on two runs or pipelines into `folder`; returns the report's path.

    Stages are compared by name, or as the only two where both are one run. Raises ArtifactError where a folder
    holds no finished run, or no stage is in both.
    """
    folder = Path(folder)
    names = _names(Path(one), Path(other))
    pairs = _pairs(finished_runs(one), finished_runs(other), names)
    if not pairs:
        raise ArtifactError(f"{one} and {other} have no stage in common; give two runs of one kind, or two pipelines")
    parts = [f"# {names[0]} and {names[1]}", _overview(pairs, names)]
    for stage, (a, b) in pairs.items():
        places = [_place(Path(root), stage) for root in (one, other)]
        parts += [
            f"## {stage}",
            _subsection("Recipe", _recipe_table(a, b, names)),
            _subsection("Files", _files(a, b)),
            _subsection("Metrics", _metrics_table(a, b, names)),
            _subsection("Curves", _curves(stage, places, names, folder)),
            _subsection("Replies", _replies(places, names)),
        ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT_FILE
    path.write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")
    return path


def recipe_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each dotted key on which two resolved recipes differ, with both values; None where a key isn't there."""
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from ((f"{key}.{inner}", x, y) for inner, x, y in recipe_differences(a, b))
        elif a != b:
            yield key, a, b


def _names(one: Path, other: Path) -> tuple[str, str]:
    """The folders' own names, or their paths where these are the same."""
    return (one.name, other.name) if one.name != other.name else (str(one), str(other))


def _pairs(
    ones: Mapping[str, Artifact], others: Mapping[str, Artifact], names: tuple[str, str]
) -> dict[str, tuple[Artifact, Artifact]]:
    if len(ones) == len(others) == 1:
        (a,), (b,) = ones.values(), others.values()
        return {a.stage: (a, b)} if a.stage == b.stage else {}
    return {
        name: (ones[name], others[name]) for name in ones if name in others and ones[name].stage == others[name].stage
    }


def _place(root: Path, stage: str) -> Path:
    return root / stage if (root / stage).is_dir() else root


def _overview(pairs: Mapping[str, tuple[Artifact, Artifact]], names: tuple[str, str]) -> str:
    rows = [
        (stage, name, run.run_id, headline(run.stage, run.metrics) or "–", duration(run.wall_s), run.fingerprint[:12])
        for stage, both in pairs.items()
        for name, run in zip(names, both, strict=True)
    ]
    return markdown_table(("stage", "in", "run", "result", "time", "fingerprint"), rows)


def _subsection(title: str, body: str) -> str:
    return section(title, body).replace("## ", "### ", 1)


def _recipe_table(a: Artifact, b: Artifact, names: tuple[str, str]) -> str:
    keys = [row for row in recipe_differences(a.recipe, b.recipe) if row[0] not in _NOT_THE_RECIPE]
    rows = [(f"`{key}`", x, y) for key, x, y in keys]
    rows += [(f"rows of {path}", x[:12], y[:12]) for path, x, y in _differing_data(a, b)]
    rows += [(f"version of {name}", x, y) for name, x, y in recipe_differences(a.versions, b.versions)]
    return markdown_table(("what differs", *names), rows) or "The recipes, rows and versions are the same."


def _differing_data(a: Artifact, b: Artifact) -> list[tuple[str, str, str]]:
    before, after = ({used.path: used.sha256 for used in run.data} for run in (a, b))
    return [(path, before[path], after[path]) for path in before if after.get(path, before[path]) != before[path]]


def _files(a: Artifact, b: Artifact) -> str:
    """Whether two runs made the same bytes, by what their artifacts recorded."""
    names = sorted(a.files.keys() | b.files.keys())
    differ = [name for name in names if a.files.get(name) != b.files.get(name)]
    if not names:
        return ""
    return f"{len(differ)} of {len(names)} differ: {', '.join(differ)}" if differ else "The same bytes."


def _metrics_table(a: Artifact, b: Artifact, names: tuple[str, str]) -> str:
    rows = [
        (name, f"{a.metrics[name]:.6g}", f"{b.metrics[name]:.6g}", f"{b.metrics[name] - a.metrics[name]:+.4g}")
        for name in sorted(a.metrics.keys() & b.metrics.keys())
    ]
    return markdown_table(("metric", *names, "difference"), rows)


def _curves(stage: str, places: list[Path], names: tuple[str, str], folder: Path) -> str:
    """A plot for each group of metrics that both logged, the second run's lines dashed."""
    lines = {name: read_metrics(place / METRICS_FILE) for name, place in zip(names, places, strict=True)}
    shown = []
    try:
        for panel, figure in compared_curves(lines).items():
            path = folder / PLOTS_FOLDER / f"{stage}_{panel}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(light_png(figure))
            shown.append(f"![{panel.replace('_', ' ')}]({PLOTS_FOLDER}/{path.name})")
    except DependencyError as error:
        return f"*{error}*"
    return "\n".join(shown)


def _replies(places: list[Path], names: tuple[str, str]) -> str:
    """Replies of both evaluations to the prompts that both answered, model by model."""
    both = [{sample["prompt"]: sample["replies"] for sample in read_evaluation(p).get("samples", [])} for p in places]
    rows = [
        (prompt, model, reply, both[1][prompt][model])
        for prompt, replies in both[0].items()
        if prompt in both[1]
        for model, reply in replies.items()
        if model in both[1][prompt]
    ]
    return markdown_table(("prompt", "model", *names), rows)
