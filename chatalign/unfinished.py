"""An unfinished run that is asked for otherwise than it was begun: refused, allowed by name, or moved aside.

``run.json`` holds what the run depends on (``inputs``), and the changes that it went on with (``changes``: key, before,
now, the checkpoint's step, the fingerprint of before). A change that was allowed waits there (``allowed``) until the
checkpoint is loaded under it: a process that is killed in between goes on, and one that can't load it changes nothing.
Light: no torch here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from chatalign import checkpoint
from chatalign.artifact import ARTIFACT_FILE, CHECKPOINTS, RUN_FILE, load_artifact, write_json, write_whole
from chatalign.carry import reasons
from chatalign.changes import PROCESSES, Change, changes_between, covers, listed, not_named, recipe_changes
from chatalign.errors import ArtifactError, ChangedRunError, CheckpointError, RecipeError
from chatalign.inputs import Inputs, inputs_fingerprint, run_inputs
from chatalign.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
_UNRECORDED = "an older chatalign kept no record of all that the run was begun with"
_UNKNOWN = Change(key="data, models or chatalign", before="as the run was begun", now="as they are")


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What differs between an unfinished run and what is asked for; `cannot` says by key what can't be carried over.

    `checkpoint` is the newest whole one: what would be lost.
    """

    folder: Path
    checkpoint: Path
    changes: Sequence[Change]
    cannot: dict[str, str]
    inputs: Inputs

    def refusal(self, allow: Collection[str] = (), *, stage: str = "") -> ChangedRunError | None:
        """What to say where `allow` doesn't name every change; `stage` is the pipeline's name for it, with a dot."""
        left = not_named(self.changes, allow)
        refused = [change for change in self.changes if change.key in self.cannot or change in left]
        if not refused:
            return None
        which, moved = "every stage" if stage else "it", f"moves this run to {previous(self.folder)}"
        again = f"`--force` begins {which} anew and {moved}"
        if stuck := [change.key for change in refused if change.key in self.cannot]:
            more = f" and {len(stuck) - 1} more" if len(stuck) > 1 else ""
            carry = f"a checkpoint can't carry {stuck[0]}{more} over: {self.cannot[stuck[0]]}"
            mend = f"{carry}; take that back, or {again}"
        else:
            keys = ",".join(f"{stage}{change.key}" for change in self.changes)
            mend = f"`--allow-change {keys}` goes on with it, {again}"
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        what = f"{refused[0]}{more}, since its unfinished run ({self.checkpoint.name}) was begun"
        lines = listed(refused, self.cannot) if more else ""
        return ChangedRunError(f"{self.folder}: {what} → {mend}{lines}")


def changed(recipe: Recipe, *, processes: int | None = None) -> Changed | None:
    """What changed since the unfinished run in a recipe's folder was begun; None where nothing did or would be lost.

    `processes` is how many will train, None where that isn't known. Raises OtherRunError where another run's
    checkpoint lies there.
    """
    folder = Path(recipe.output_dir)
    begun = read_run_file(folder)
    if not begun or is_finished(folder) or not checkpoint.list_checkpoints(folder / CHECKPOINTS):
        return None
    now, settings = run_inputs(recipe), recipe.model_dump(mode="json")
    changes: list[Change] = []
    if inputs_fingerprint(now) not in fingerprints(begun):
        if known := begun.get("inputs"):
            changes = changes_between(known, now)
        else:
            changes = list(recipe_changes(recipe_as_begun(folder), settings)) or [_UNKNOWN]
    cannot = {} if "inputs" in begun else dict.fromkeys((change.key for change in changes), _UNRECORDED)
    changes += _processes(folder, begun, processes)
    if not changes or (newest := checkpoint.latest_valid(folder / CHECKPOINTS, str(begun["run_id"]))) is None:
        return None
    cannot |= reasons(changes, begun.get("inputs", {}).get("recipe", settings), settings)
    return Changed(folder=folder, checkpoint=newest, changes=changes, cannot=cannot, inputs=now)


def judged(
    recipe: Recipe,
    *,
    processes: int | None = None,
    allow: Collection[str] = (),
    stage: str = "",
    made_here: Collection[str] = (),
) -> Changed | None:
    """What changed since an unfinished run was begun, where that is allowed; raises ChangedRunError where it isn't.

    `allow` has to name every change. None is asked for where a run among the inputs, made by the same pipeline in one
    of the folders `made_here`, is another one now: the child then begins anew, as it does where it was finished.
    """
    folder = Path(recipe.output_dir)
    if allow and is_finished(folder):
        _refuse_finished(recipe, folder)
    found = changed(recipe, processes=processes)
    if found is None or _came_down_the_chain(recipe, found, made_here):
        return found
    keys = [change.key for change in found.changes]
    earlier = [change["key"] for change in read_run_file(folder).get("changes", [])]
    if unchanged := [name for name in allow if not any(covers(name, key) for key in [*keys, *earlier])]:
        what = [replace(change, key=f"{stage}{change.key}") for change in found.changes]
        did = f"that didn't change in {folder}; what did:{listed(what, {})}"
        raise ChangedRunError(f"--allow-change {stage}{unchanged[0]}: {did}")
    if refusal := found.refusal(allow, stage=stage):
        raise refusal
    return found


def settle(
    recipe: Recipe,
    *,
    force: bool = False,
    allow: Collection[str] = (),
    made_here: Collection[str] = (),
    **judging: Any,
) -> str | None:
    """Make way for a recipe's run as :func:`judged` has it; returns a line for the user where something was done.

    A run that was begun otherwise goes on where that is allowed; it is moved aside under `force`, and where the
    change came down a pipeline. The caller holds the folder's lock. Keys that are allowed where nothing changed are no
    error: the same command, given again after a kill, has to go on.
    """
    folder = Path(recipe.output_dir)
    if force:
        found = changed(recipe)
    else:
        found = judged(recipe, allow=allow, made_here=made_here, **judging)
    if found is None:
        return _nothing_changed(recipe, folder) if allow else None
    if force or _came_down_the_chain(recipe, found, made_here):
        keys = ", ".join(change.key for change in found.changes)
        return f"{folder}: moved to {move_aside(folder)}, since it was begun otherwise ({keys})"
    begun, mark = read_run_file(folder), inputs_fingerprint(found.inputs)
    waiting = begun.get("allowed", {"fingerprint": None})
    already = waiting["changes"] if waiting["fingerprint"] == mark else []
    changes = [*already, *(change.as_json() for change in found.changes)]
    allowed = {"fingerprint": mark, "inputs": found.inputs, "changes": changes}
    write_json(folder / RUN_FILE, begun | {"allowed": allowed})
    return f"{folder}: goes on from {found.checkpoint.name} with {', '.join(map(str, found.changes))}"


def take_allowed(folder: Path, settings: dict[str, Any], *, fingerprint: str, step: int) -> None:
    """Note that a run goes on from `step` under the change that was allowed; nothing where none waits for it."""
    begun = read_run_file(folder)
    allowed = begun.pop("allowed", None)
    if allowed is None or allowed["fingerprint"] != fingerprint:
        return
    at = {"step": step, "fingerprint": begun["fingerprint"]}
    changes = [*begun.get("changes", []), *(change | at for change in allowed["changes"])]
    write_whole(folder / RECIPE_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_json(folder / RUN_FILE, begun | {"fingerprint": fingerprint, "inputs": allowed["inputs"], "changes": changes})


def fingerprints(begun: dict[str, Any]) -> tuple[str, ...]:
    """Those that a run goes on under: its own, and that of a change which was allowed."""
    return tuple(each["fingerprint"] for each in (begun, begun.get("allowed")) if each)


def earlier_fingerprints(begun: dict[str, Any], fingerprint: str) -> frozenset[str]:
    """Those under which a run wrote checkpoints before a change that was allowed."""
    changes = begun.get("changes", [])
    return frozenset({begun["fingerprint"], *(change["fingerprint"] for change in changes)} - {fingerprint})


def allowed_processes(begun: dict[str, Any]) -> int | None:
    """How many processes a run was last allowed to go on with; None where it never was."""
    changes = [*begun.get("changes", []), *(begun.get("allowed") or {}).get("changes", [])]
    return next((int(change["now"]) for change in reversed(changes) if change["key"] == PROCESSES), None)


def read_run_file(folder: Path) -> dict[str, Any]:
    """What ``run.json`` holds; empty where there is none, or none that can be read."""
    try:
        begun = json.loads((folder / RUN_FILE).read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return begun if isinstance(begun, dict) and "fingerprint" in begun else {}


def recipe_as_begun(folder: Path) -> dict[str, Any]:
    """What ``recipe.yaml`` of a run folder holds; empty where it can't be read."""
    try:
        settings = yaml.safe_load((folder / RECIPE_FILE).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def is_finished(folder: Path) -> bool:
    """Whether a run folder has an artifact, whatever its fingerprint."""
    try:
        load_artifact(folder)
    except ArtifactError:
        return False
    return True


def previous(folder: Path) -> Path:
    """Where a run folder is moved to."""
    return folder.with_name(folder.name + ".previous")


def move_aside(folder: Path) -> Path:
    """Move a run folder to ``NAME.previous``, replacing the one before; refuse a folder that is no run."""
    if not any((folder / name).exists() for name in (RUN_FILE, ARTIFACT_FILE)):
        raise RecipeError(f"{folder}: holds files that are no chatalign run; give another `output_dir`")
    place = previous(folder)
    if place.exists():
        shutil.rmtree(place)
    folder.rename(place)
    return place


def _processes(folder: Path, begun: dict[str, Any], now: int | None) -> list[Change]:
    """Whether the newest checkpoint was written by another number of processes than will go on with it."""
    if now is None or now == allowed_processes(begun):
        return []
    for newest in reversed(checkpoint.list_checkpoints(folder / CHECKPOINTS)):
        try:
            before = checkpoint.read_manifest(newest)["world_size"]
        except CheckpointError:
            continue
        return [] if before in (None, now) else [Change(key=PROCESSES, before=before, now=now)]
    return []


def _came_down_the_chain(recipe: Recipe, found: Changed, made_here: Collection[str]) -> bool:
    sections = {role: getattr(recipe, role, None) for role in ("model", "reward_model", "value_model")}
    runs = {f"{role}.run" for role, section in sections.items() if section and section.name_or_path in made_here}
    return any(change.key in runs for change in found.changes)


def _nothing_changed(recipe: Recipe, folder: Path) -> str | None:
    """A line for who allowed a change and made none; None where one was allowed before, or nothing is unfinished."""
    begun = read_run_file(folder)
    if is_finished(folder) or begun.get("fingerprint") != inputs_fingerprint(run_inputs(recipe)) or "changes" in begun:
        return None
    return f"{folder}: nothing changed since its unfinished run was begun, so that --allow-change allows nothing"


def _refuse_finished(recipe: Recipe, folder: Path) -> None:
    if load_artifact(folder).fingerprint != inputs_fingerprint(run_inputs(recipe)):
        raise ChangedRunError(
            f"{folder}: its run is finished, and --allow-change goes on with an unfinished one; leave it out to run "
            f"again from the start (the finished run is moved to {previous(folder)})"
        )
