"""What a pipeline came to: ``summary.json``, the reports, and how two runs compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatalign.artifact import load_artifact, versions, write_json
from chatalign.launch import say
from chatalign.phases import overhead
from chatalign.recipe import PipelineRecipe, Recipe

SUMMARY_FILE = "summary.json"


def summarise(
    pipeline: PipelineRecipe,
    stages: Mapping[str, Recipe],
    statuses: Mapping[str, str],
    seconds: Mapping[str, Mapping[str, float]],
    *,
    wall_s: float,
) -> dict[str, Any]:
    """The machine's view of a pipeline run, from the artifacts of its stages; `seconds` are a stage's by phase.

    ``overhead_s`` is what a stage took beside its loops of training and scoring, in the run that made it.
    """
    rows: list[dict[str, Any]] = []
    evaluation: dict[str, Any] = {}
    before = {row["name"]: row.get("seconds", {}) for row in _summary_before(pipeline).get("stages", [])}
    for name, recipe in stages.items():
        if statuses[name] in ("failed", "interrupted", "blocked"):
            rows.append({"name": name, "stage": recipe.stage, "status": statuses[name], "metrics": {}})
            continue
        artifact = load_artifact(recipe.output_dir)
        spent = seconds.get(name) or before.get(name, {})
        rows.append(
            {
                "name": name,
                "stage": recipe.stage,
                "status": statuses[name],
                "wall_s": round(artifact.wall_s, 2),
                "overhead_s": round(overhead(spent), 2),
                "seconds": dict(spent),
                "tokens_per_s": round(artifact.tokens_per_s, 1),
                "metrics": artifact.metrics,
                "run_id": artifact.run_id,
                "fingerprint": artifact.fingerprint,
            }
        )
        if recipe.stage == "eval":
            evaluation = json.loads((Path(recipe.output_dir) / "eval.json").read_text("utf-8"))
    return {
        "pipeline": pipeline.pipeline,
        "stages": rows,
        "eval": evaluation.get("models", {}),
        "reward_model": evaluation.get("reward_model", {}),
        "samples": evaluation.get("samples", []),
        "wall_s": round(wall_s, 2),
        "versions": versions(),
    }


def _summary_before(pipeline: PipelineRecipe) -> dict[str, Any]:
    path = Path(pipeline.output_dir) / SUMMARY_FILE
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def report_pipeline(folder: Path, summary: dict[str, Any], *, changed: bool) -> None:
    """Write the report and, last, the summary where a stage ran since the last one; print the tables in any case."""
    from rich.console import Console

    from chatalign.report import print_pipeline_summary, write_pipeline_report

    path = folder / SUMMARY_FILE
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {"stages": []}
    changed = changed or _runs(before) != _runs(summary)  # by a process that was killed before it got here
    if not changed:  # the wall time of the run that made it is the one worth keeping
        summary["wall_s"] = before["wall_s"]
    if changed or not (folder / "report.md").is_file():
        write_pipeline_report(folder, summary)
    write_json(path, summary)
    print_pipeline_summary(summary, Console())


def _runs(summary: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    return [(row["name"], row.get("run_id")) for row in summary["stages"]]


def write_report(folder: Path) -> None:
    """Write the report of a stage's or a pipeline's run folder again, and draw what it came from."""
    from rich.console import Console

    from chatalign.report import write_pipeline_report, write_run_report
    from chatalign.report.lineage import finished_runs, lineage_of, tree

    if (folder / SUMMARY_FILE).is_file():
        write_pipeline_report(folder, json.loads((folder / SUMMARY_FILE).read_text("utf-8")))
    else:
        load_artifact(folder)
        write_run_report(folder)
    Console(soft_wrap=True).print(tree(lineage_of(finished_runs(folder)), str(folder)))
    say(f"{folder / 'report.md'}")


def compare_runs(one: Path, other: Path, output: str | None) -> None:
    """Write a report on two runs or pipelines beside each other, by default into ONE-vs-OTHER beside the first."""
    from chatalign.report import write_comparison

    folder = one.parent / f"{one.name}-vs-{other.name}" if output is None else Path(output)
    say(f"{write_comparison(one, other, folder)}")
