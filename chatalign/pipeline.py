"""The chain: stages of a pipeline recipe, one after another, each skipped where it is fresh and resumed where it isn't.

Light until a stage has to run: a finished pipeline is answered from its artifacts without importing torch.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chatalign.artifact import ARTIFACT_FILE, Artifact, load_artifact, versions, write_json
from chatalign.errors import ChatalignError, Interrupted
from chatalign.launch import around, hand_out, quiet_libraries, refuse_problems, say
from chatalign.phases import account, open_account, overhead, phase
from chatalign.recipe import PipelineRecipe, Recipe, apply_overrides, load_pipeline, read_yaml, validate_stage
from chatalign.runs import finished, locked, open_run, recipe_fingerprint, status
from chatalign.warm import as_if_alone, import_once

if TYPE_CHECKING:
    from chatalign.check import LookedAt

STAGE_MODULES = {
    "pretrain": "chatalign.pretrain",
    "sft": "chatalign.sft",
    "reward": "chatalign.reward",
    "dpo": "chatalign.dpo",
    "ppo": "chatalign.ppo",
    "kto": "chatalign.kto",
    "eval": "chatalign.evaluate",
}
SUMMARY_FILE = "summary.json"


def run_stage(recipe: Recipe) -> Artifact:
    """Run one stage to its artifact, whatever its kind; imports the stage's module on the way."""
    quiet_libraries()
    with phase("import"):
        module = import_once(STAGE_MODULES[recipe.stage])
    return module.run(recipe)


def resolve_stages(pipeline: PipelineRecipe, path: str | Path) -> dict[str, Recipe]:
    """Every stage's recipe, chained and validated, before anything runs; raises RecipeError naming the stage."""
    home = Path(path).parent
    resolved: dict[str, Recipe] = {}
    for name, entry in pipeline.stages.items():
        raw = read_yaml(home / entry.recipe)
        inputs: dict[str, Any] = {"output_dir": str(Path(pipeline.output_dir) / name)}
        for role in ("model", "reward_model", "value_model"):
            if source := getattr(entry, role):
                inputs[f"{role}.name_or_path"] = _place(pipeline, source)
        if entry.models:
            inputs["models"] = {source: {"name_or_path": _place(pipeline, source)} for source in entry.models}
        raw = apply_overrides(raw, inputs | entry.overrides)
        resolved[name] = validate_stage(raw, where=f"{path}: stage {name} ({home / entry.recipe})")
    return resolved


def _place(pipeline: PipelineRecipe, source: str) -> str:
    return str(Path(pipeline.output_dir) / source) if source in pipeline.stages else source


def run_pipeline(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    accelerate_config: str | Path | None = None,
) -> dict[str, Any]:
    """Run a pipeline recipe and return its summary (what ``summary.json`` holds).

    `force` runs every stage again. `accelerate_config` starts each training stage through
    ``accelerate launch --config_file``; without it all stages share this process.
    """
    pipeline = load_pipeline(path, overrides)
    stages = resolve_stages(pipeline, path)
    folder = Path(pipeline.output_dir)
    started = time.perf_counter()
    open_account()
    with locked(folder):
        with phase("check"):
            _refuse_what_cannot_run(stages)
        statuses: dict[str, str] = {}
        seconds: dict[str, dict[str, float]] = {}
        for number, (name, recipe) in enumerate(stages.items(), start=1):
            statuses[name] = _run_one(recipe, f"[{number}/{len(stages)}] {name}", force, accelerate_config)
            if statuses[name] != "skipped":
                seconds[name] = account()
                say(f"    {around(seconds[name])}")
                open_account()
        summary = summarise(pipeline, stages, statuses, seconds, wall_s=time.perf_counter() - started)
        _report(folder, summary, changed=any(state != "skipped" for state in statuses.values()))
    return summary


def _refuse_what_cannot_run(stages: Mapping[str, Recipe]) -> None:
    """Look at the files of every stage that isn't known to be finished, so that the last one's typo costs no hours."""
    made_later = frozenset(recipe.output_dir for recipe in stages.values())
    looked_at: LookedAt = {}
    for recipe in stages.values():
        if not (Path(recipe.output_dir) / ARTIFACT_FILE).exists():
            refuse_problems(recipe, made_later=made_later, looked_at=looked_at)


def _run_one(recipe: Recipe, title: str, force: bool, accelerate_config: str | Path | None) -> str:
    """Bring one stage up to date; returns what had to be done: skipped, resumed or ran."""
    with phase("check"):
        if not force and finished(recipe) is not None:
            say(f"{title}: fresh, skipped")
            return "skipped"
        state = status(recipe.output_dir, recipe_fingerprint(recipe))
    say(f"{title}: {'resuming' if state == 'resumable' else 'running'} ({recipe.stage})")
    if accelerate_config is not None and recipe.stage != "eval":
        with phase("train"):  # in processes of its own, which keep no account here
            _launch(recipe, accelerate_config)
    else:
        _run_here(recipe)
    return "resumed" if state == "resumable" else "ran"


def _run_here(recipe: Recipe) -> None:
    """Run a stage in this process, which is afterwards as it was before."""
    with phase("import"):
        import_once(STAGE_MODULES[recipe.stage])
    with locked(recipe.output_dir), as_if_alone():
        run_stage(recipe)
        hand_out(recipe)


def _launch(recipe: Recipe, accelerate_config: str | Path) -> None:
    """One stage in processes of its own; they join the run that is opened here."""
    run = open_run(recipe)
    path = run.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8")
    module = STAGE_MODULES[recipe.stage]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(accelerate_config),
        "-m",
        module,
    ]
    code, stopped = _wait([*command, str(path)])
    if stopped:
        raise Interrupted(f"{recipe.output_dir}: stopped; the same command goes on from its last checkpoint")
    if code != 0:
        raise ChatalignError(f"{recipe.output_dir}: `{' '.join(command)} {path}` ended with status {code}; see above")


def _wait(command: list[str]) -> tuple[int, bool]:
    """Run a launcher to its end, however long it takes to save after a signal; (status, whether it was asked to stop).

    A terminal's Ctrl-C reaches the launcher by itself; SIGTERM is passed on.
    """
    received: list[int] = []
    process = subprocess.Popen(command)

    def note(number: int, _frame: object) -> None:
        received.append(number)
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait(), bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    rows, evaluation = [], {}
    before = {row["name"]: row.get("seconds", {}) for row in _summary_before(pipeline).get("stages", [])}
    for name, recipe in stages.items():
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


def _report(folder: Path, summary: dict[str, Any], *, changed: bool) -> None:
    """Write summary and report where a stage ran; print the tables in any case."""
    from rich.console import Console

    from chatalign.report import print_pipeline_summary, write_pipeline_report

    path = folder / SUMMARY_FILE
    if not changed and path.is_file():  # the wall time of the run that made it is the one worth keeping
        summary["wall_s"] = json.loads(path.read_text("utf-8"))["wall_s"]
    write_json(path, summary)
    if changed or not (folder / "report.md").is_file():
        write_pipeline_report(folder, summary)
    print_pipeline_summary(summary, Console())


def write_report(folder: Path) -> None:
    """Write the report of a stage's or a pipeline's run folder again."""
    from chatalign.report import write_pipeline_report, write_run_report

    if (folder / SUMMARY_FILE).is_file():
        write_pipeline_report(folder, json.loads((folder / SUMMARY_FILE).read_text("utf-8")))
    else:
        load_artifact(folder)
        write_run_report(folder)
    say(f"{folder / 'report.md'}")
