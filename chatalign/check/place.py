"""Where a run writes: whose folder that is, whose checkpoints lie there, and whether what it writes fits the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chatalign import checkpoint
from chatalign.artifact import ARTIFACT_FILE, CHECKPOINTS, RUN_FILE
from chatalign.changes import recipe_changes
from chatalign.check.findings import Finding
from chatalign.check.identity import HASHED_BYTES, weights_bytes
from chatalign.check.sizes import Sizes, estimate
from chatalign.errors import ArtifactError, ChangedRunError, CheckpointError, OtherRunError, RecipeError
from chatalign.inputs import model_inputs, recipe_fingerprint
from chatalign.recipe import Recipe
from chatalign.runs import status
from chatalign.unfinished import judged, recipe_as_begun


def output_finding(recipe: Recipe) -> Finding:
    """Whether `output_dir` is free or a chatalign run's."""
    folder = Path(recipe.output_dir)
    ours = not folder.exists() or not any(folder.iterdir()) or (folder / RUN_FILE).exists()
    ours = ours or (folder / ARTIFACT_FILE).exists()
    mend = f"`output_dir: {folder}` holds files that are no chatalign run; give another folder"
    return Finding("output", f"`output_dir`: {folder}", None if ours else RecipeError(mend))


def checkpoint_findings(recipe: Recipe, earlier: Mapping[str, Recipe]) -> Iterator[Finding]:
    """What a launch would do with the run that lies in `output_dir`, and whether its checkpoints are that run's.

    `earlier` are the stages of the same pipeline, by their folders.
    """
    folder = Path(recipe.output_dir)
    begun = (folder / RUN_FILE).is_file() or (folder / ARTIFACT_FILE).is_file()
    if not begun or sum(weights_bytes(s.name_or_path or "") for s in model_inputs(recipe).values()) > HASHED_BYTES:
        return
    try:
        state = status(folder, recipe_fingerprint(recipe))
    except (ArtifactError, OSError):
        return  # a parent is unfinished, or a file is missing: other checks say so
    what = f"the run in {folder}"
    finished = f"{what} is finished and unchanged; nothing will run → --force runs it"
    if state == "finished":
        yield Finding("checkpoints", what, note=finished)
    elif state == "resumable":
        yield _resumed(folder, what)
    elif state == "stale":
        yield _stale(recipe, earlier, what)


def _resumed(folder: Path, what: str) -> Finding:
    """Which checkpoint a launch goes on from; a failure where one is another run's."""
    run_id = str(json.loads((folder / RUN_FILE).read_text("utf-8"))["run_id"])
    skipped: list[str] = []
    for found in reversed(checkpoint.list_checkpoints(folder / CHECKPOINTS)):
        try:
            checkpoint.verify(found, run_id)
        except OtherRunError as error:
            return Finding("checkpoints", what, error)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        if skipped:
            going_on = f"nothing to do: the run goes on from {found.name}, the newest whole one"
            return Finding("checkpoints", what, note=f"{skipped[0]} → {going_on}")
        return Finding("checkpoints", f"{what} goes on from {found.name}")
    note = f"{skipped[0]} → nothing to do: the run begins again, there is no whole checkpoint" if skipped else None
    return Finding("checkpoints", f"{what} begins again, it has no checkpoint", note=note)


def _stale(recipe: Recipe, earlier: Mapping[str, Recipe], what: str) -> Finding:
    """A failure where a launch would refuse to lose checkpoints, else a note that the run goes aside."""
    folder = Path(recipe.output_dir)
    try:
        judged(recipe, stage=f"{folder.name}." if earlier else "", made_here=earlier)
    except (ChangedRunError, OtherRunError) as error:
        return Finding("checkpoints", what, error)
    return Finding("checkpoints", what, note=_moved_aside(recipe, folder))


def _moved_aside(recipe: Recipe, folder: Path) -> str:
    previous = folder.with_name(folder.name + ".previous")
    count = len(checkpoint.list_checkpoints(folder / CHECKPOINTS))
    held = f" and its {count} checkpoints" if count else ""
    lost = ", in place of the one there" if previous.exists() else ""
    changed = next(recipe_changes(recipe_as_begun(folder), recipe.model_dump(mode="json")), None)
    why = f"{changed}" if changed else "its data, models or chatalign have changed since"
    return (
        f"{folder} holds the run of another recipe ({why}): it{held} will be moved to {previous}{lost} "
        f"→ give another `output_dir` to keep both"
    )


@dataclass
class DiskUse:
    """Bytes that the stages of one check will have written, by device; a pipeline's stages share their disks."""

    by_device: dict[int, int] = field(default_factory=dict)


def disk_finding(recipe: Recipe, earlier: Mapping[str, Recipe], used: DiskUse) -> Finding | None:
    """Whether checkpoints, model and kept tokens fit where they are written; None where their size isn't known."""
    folder = Path(recipe.output_dir)
    if (folder / ARTIFACT_FILE).is_file() or (sizes := estimate(recipe, earlier)) is None:
        return None
    cache = datasets_cache()
    wanted = {folder: sizes.output, cache: sizes.tokens}
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    what = f"disk: {_said(sizes)} in {folder}"
    problem = None
    needed = dict(used.by_device)
    for place, size in wanted.items():
        device, free = _disk(place)
        needed[device] = needed.get(device, 0) + size
        room = free + (there if place == folder else 0)
        if needed[device] > room and problem is None:
            problem = RecipeError(
                f"{place}: {in_words(room)} are free, and by this stage about {in_words(needed[device])} are written "
                f"there ({_said(sizes)}); free some, lower `train.save_total_limit`, or give a larger disk"
            )
    for place, size in {folder: sizes.afterwards, cache: sizes.tokens}.items():
        device, _ = _disk(place)
        used.by_device[device] = used.by_device.get(device, 0) + size
    return Finding("disk", what, problem)


def _said(sizes: Sizes) -> str:
    checkpoints = f"{sizes.kept + 1} checkpoints of {in_words(sizes.checkpoint)}, " if sizes.kept else ""
    return f"about {in_words(sizes.output)} ({checkpoints}the model {in_words(sizes.model)})"


def _disk(place: Path) -> tuple[int, int]:
    """The device that a folder is on, or will be, and its free bytes."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return os.stat(place).st_dev, shutil.disk_usage(place).free


def datasets_cache() -> Path:
    """Where tokens are kept: what ``datasets.config.HF_DATASETS_CACHE`` is, without importing datasets."""
    if given := os.environ.get("HF_DATASETS_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "datasets"


def in_words(size: int) -> str:
    """Bytes as MB below one GB, else as GB."""
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
