"""The chain: stages of a pipeline recipe, one after another, each skipped where it is fresh and resumed where it isn't.

Light until a stage has to run: a finished pipeline is answered from its artifacts without importing torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from chatalign.artifact import ARTIFACT_FILE, Artifact
from chatalign.beside import Beside
from chatalign.engine.signals import STATUS_FILE, passed_on
from chatalign.errors import ChatalignError, Interrupted, StageStopped
from chatalign.inputs import recipe_fingerprint
from chatalign.launch import (
    allowed_keys,
    around,
    catch_up,
    hand_out,
    quiet_libraries,
    refuse_problems,
    say,
)
from chatalign.permits import Permits, by_stage
from chatalign.phases import account, open_account, phase
from chatalign.recipe import PipelineRecipe, Recipe, apply_overrides, load_pipeline, read_yaml, validate_stage
from chatalign.runs import finished, locked, open_run, status
from chatalign.side_by_side import Progress, side_by_side
from chatalign.summary import report_pipeline, summarise
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
    "eval": "chatalign.evaluate.stage",
}


def run_stage(recipe: Recipe) -> Artifact:
    """Run one stage to its artifact, whatever its kind; imports the stage's module on the way."""
    quiet_libraries()
    with phase("import"):
        module = _imported(recipe)
    return module.run(recipe)


def _imported(recipe: Recipe) -> ModuleType:
    adapter = getattr(recipe, "lora", None) is not None and recipe.stage != "ppo"  # replies' products are of many kinds
    return import_once(STAGE_MODULES[recipe.stage], adapter=adapter)


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
    allow_change: Sequence[str] = (),
    accelerate_config: str | Path | None = None,
    jobs: int | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Run a pipeline recipe and return its summary (what ``summary.json`` holds).

    `force` runs every stage again. `allow_change` names keys, each after its stage's name, that may have changed since
    an unfinished run was begun, which then goes on. `accelerate_config` starts each training stage through
    ``accelerate launch --config_file``; without it all stages share this process. With `jobs` above 1 stages that
    don't need one another run side by side, each in a process and on a GPU of its own; None is as many as there are
    GPUs. `only` leaves all other stages out. A stage that fails leaves those that don't need it running; its error is
    raised at the end.
    """
    pipeline = load_pipeline(path, overrides)
    allow = by_stage(allowed_keys(allow_change, force=force), pipeline.stages)
    stages = resolve_stages(pipeline, path)
    if only is not None:
        stages = {name: recipe for name, recipe in stages.items() if name in only}
    permits = Permits(stages=stages, force=force, allow=allow, accelerate_config=accelerate_config)
    folder = Path(pipeline.output_dir)
    started = time.perf_counter()
    open_account()
    with locked(folder):
        with phase("check"):
            _refuse_what_cannot_run(stages)
            permits.refuse()
        progress = Progress(stages, {name: inputs_of(pipeline, name) for name in stages})
        jobs = _gpus() if jobs is None else jobs
        if jobs > 1 and accelerate_config is None:
            side_by_side(progress, STAGE_MODULES, jobs=jobs, permits=permits)
        else:
            with Beside(stages) as beside:
                _one_by_one(progress, permits, accelerate_config, beside)
                beside.wait()
        statuses, wall_s = progress.statuses, time.perf_counter() - started
        summary = summarise(pipeline, stages, statuses, progress.seconds, wall_s=wall_s)
        report_pipeline(folder, summary, changed=any(state != "skipped" for state in statuses.values()))
    progress.raise_failure()
    return summary


def inputs_of(pipeline: PipelineRecipe, name: str) -> set[str]:
    """The stages that a stage takes something from."""
    entry = pipeline.stages[name]
    named = (entry.model, entry.reward_model, entry.value_model, *entry.models)
    return {source for source in named if source in pipeline.stages}


def _gpus() -> int:
    """How many GPUs stages could have to themselves, at least 1; asks the driver, not torch."""
    from shutil import which

    if which("nvidia-smi") is None:
        return 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip()]))
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return max(1, len(listed.stdout.splitlines()))


def _one_by_one(progress: Progress, permits: Permits, accelerate_config: str | Path | None, beside: Beside) -> None:
    """Bring every stage up to date in turn; those that need a failed one are left out."""
    for number, name in enumerate(progress.stages, start=1):
        title = f"[{number}/{len(progress.stages)}] {name}"
        if progress.blocked(name):
            missing = ", ".join(sorted(progress.needs[name] & progress.failures.keys()))
            say(f"{title}: left out, since it needs {missing}")
            continue
        try:
            status = _run_one(name, title, permits, accelerate_config, beside)
        except ChatalignError as error:
            if type(error) is Interrupted:  # this process got a signal: no other stage begins
                raise
            progress.failed(name, error)
            say(f"{title}: {progress.statuses[name]}: {error}")
            open_account()
            continue
        progress.statuses[name] = status
        if status != "skipped":
            progress.seconds[name] = account()
            say(f"    {around(progress.seconds[name])}")
            open_account()


def _refuse_what_cannot_run(stages: Mapping[str, Recipe]) -> None:
    """Look at the files of every stage that isn't known to be finished, so that the last one's typo costs no hours."""
    made_later = frozenset(recipe.output_dir for recipe in stages.values())
    looked_at: LookedAt = {}
    for recipe in stages.values():
        if not (Path(recipe.output_dir) / ARTIFACT_FILE).exists():
            refuse_problems(recipe, made_later=made_later, looked_at=looked_at)


def _run_one(name: str, title: str, permits: Permits, accelerate_config: str | Path | None, beside: Beside) -> str:
    """Bring one stage up to date; returns what had to be done: skipped, resumed or ran."""
    recipe = permits.stages[name]
    with phase("check"):
        if not permits.force and finished(recipe) is not None:
            say(f"{title}: fresh, skipped")
            catch_up(recipe)
            return "skipped"
        permits.make_way(name)
        state = status(recipe.output_dir, recipe_fingerprint(recipe))
    say(f"{title}: {'resuming' if state == 'resumable' else 'running'} ({recipe.stage})")
    if accelerate_config is not None and recipe.stage != "eval":
        with phase("train"):  # in processes of its own, which keep no account here
            _launch(recipe, accelerate_config)
    else:
        _run_here(recipe, beside)
    return "resumed" if state == "resumable" else "ran"


def _run_here(recipe: Recipe, beside: Beside) -> None:
    """Run a stage in this process, which is afterwards as it was before."""
    untouched = "torch" not in sys.modules
    with phase("import"):
        _imported(recipe)
    if untouched:
        beside.begin(recipe)
    with locked(recipe.output_dir), as_if_alone():
        run_stage(recipe)
        hand_out(recipe, beside.report)


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
    with TemporaryDirectory() as folder:
        code, asked = _wait([*command, str(path)], Path(folder) / "status")
        saved = any(Path(folder).iterdir())
    if asked:
        raise Interrupted(f"{recipe.output_dir}: stopped; the same command goes on from its last checkpoint")
    if saved:
        raise StageStopped(f"{recipe.output_dir}: stopped and saved, see above; the same command goes on from there")
    if code != 0:
        raise ChatalignError(f"{recipe.output_dir}: `{' '.join(command)} {path}` ended with status {code}; see above")


def _wait(command: list[str], status_file: Path) -> tuple[int, bool]:
    """Run a launcher to its end, however long it takes to save after a signal; (status, whether it was asked to stop).

    In a session of its own: what a terminal sends reaches the stage's processes through this one, once.
    """
    environment, started = os.environ | {STATUS_FILE: str(status_file)}, list[psutil.Popen]()
    with passed_on(lambda number: _signal_processes(started, number)) as received:
        started.append(psutil.Popen(command, env=environment, start_new_session=True))
        if received:  # while it was started
            started[0].terminate()
        return started[0].wait(), bool(received)


def _signal_processes(launchers: Sequence[psutil.Popen], number: int) -> None:
    """Send a signal to the processes that a launcher started, past it: a launcher kills them 30 s after its own."""
    for launcher in launchers:
        with suppress(psutil.NoSuchProcess):
            processes = launcher.children()
            for process in processes:
                process.send_signal(number)
            if not processes:
                launcher.terminate()
