"""Run folders: what a recipe's run is called, whether it is finished, and how a run is opened.

A run's *fingerprint* covers everything that its result depends on: the recipe without its place and reporting,
the parents' fingerprints, the contents of local data and model files, and chatalign's version. Where a finished
run has the same fingerprint there is nothing to do; where an unfinished one has, it goes on from its checkpoint;
anything else in the folder is moved aside to ``NAME.previous``, never deleted unasked. Light: no torch here.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from chatalign.artifact import (
    ARTIFACT_FILE,
    MODEL_FOLDER,
    RUN_FILE,
    Artifact,
    Parent,
    load_artifact,
    sync,
    verify_files,
    write_json,
)
from chatalign.errors import ArtifactError, RecipeError
from chatalign.inputs import parents_of, recipe_fingerprint
from chatalign.recipe import Recipe

CHECKPOINTS = "checkpoints"
Status = Literal["finished", "resumable", "stale", "new"]
# Loading holds these to the artifact itself, and a recipe may name another template or tokenizer in their place.
_OWN_CHECK = ("chat_template.jinja", "tokenizer.json", "generation_config.json")
_locks: set[IO[str]] = set()  # the files that this process holds locks by


def _hold_no_locks() -> None:
    for file in _locks:
        file.close()
    _locks.clear()


# A lock lasts until every process has closed its file: a loader's worker would hold it beyond its parent's death.
os.register_at_fork(after_in_child=_hold_no_locks)


@dataclass(frozen=True, kw_only=True)
class Run:
    """An opened run: where it writes, and who it is."""

    folder: Path
    run_id: str
    fingerprint: str
    parents: list[Parent]

    @property
    def model_folder(self) -> Path:
        """Where the finished model or adapter goes."""
        return self.folder / MODEL_FOLDER

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / CHECKPOINTS


def status(folder: str | Path, run_fingerprint: str) -> Status:
    """What a run folder holds for a run of this fingerprint."""
    folder = Path(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return "new"
    try:
        artifact = load_artifact(folder)
        complete = all((folder / name).is_file() for name in artifact.files)
        if artifact.fingerprint == run_fingerprint and complete:
            return "finished"
    except ArtifactError:
        pass  # unfinished or unreadable: the run file below decides
    else:
        return "stale"
    begun = _read_run_file(folder)
    return "resumable" if begun.get("fingerprint") == run_fingerprint else "stale"


def world_size() -> int:
    """How many processes this launch has (1 without a launcher), from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes files, from the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def open_run(recipe: Recipe) -> Run:
    """Make the run folder ready: go on in it where it is the same run, else start anew beside what was there.

    With several processes the main one does so first and the others join the run that it opened.
    """
    if world_size() == 1:
        order = nullcontext()
    else:
        import torch
        from accelerate import PartialState

        # Without `cpu` a launch on CPUs is taken for unconnected processes, and nobody waits for the main one.
        on_cpu = getattr(getattr(recipe, "train", None), "use_cpu", False) or not torch.accelerator.is_available()
        order = PartialState(cpu=on_cpu).main_process_first()
    with order:
        return _open_run(recipe)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process; raises RecipeError where another run holds it. Freed when the process ends."""
    if not is_main_process():
        yield
        return
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"{folder}: another chatalign run writes here; wait for it, or change `output_dir`"
            ) from None
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)


def _open_run(recipe: Recipe) -> Run:
    import secrets

    folder = Path(recipe.output_dir)
    run_fingerprint = recipe_fingerprint(recipe)
    parents = parents_of(recipe)
    if is_main_process():
        _refuse_altered(parents)
    state = status(folder, run_fingerprint)
    if state == "resumable":
        run_id = str(_read_run_file(folder)["run_id"])
        return Run(folder=folder, run_id=run_id, fingerprint=run_fingerprint, parents=parents)
    if state in ("stale", "finished"):
        move_aside(folder)
    run_id = secrets.token_hex(6)
    settings = recipe.model_dump(mode="json")
    place = folder.resolve()
    for left in place.parent.glob(f".{place.name}.new-*"):  # by a process that was killed right here
        shutil.rmtree(left)
    # Under another name until it is whole: a folder without run.json is nobody's, and would be refused for ever.
    made = place.with_name(f".{place.name}.new-{run_id}")
    made.mkdir(parents=True)
    (made / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "utf-8")
    write_json(made / RUN_FILE, {"run_id": run_id, "stage": recipe.stage, "fingerprint": run_fingerprint})
    os.replace(made, place)
    sync(place.parent)
    return Run(folder=folder, run_id=run_id, fingerprint=run_fingerprint, parents=parents)


def _refuse_altered(parents: Iterable[Parent]) -> None:
    """Raise ArtifactError where a parent's files are no longer those that it recorded: its fingerprint says nothing."""
    for folder in dict.fromkeys(parent.path for parent in parents):
        files = {name: digest for name, digest in load_artifact(folder).files.items() if not name.endswith(_OWN_CHECK)}
        if problems := verify_files(folder, files):
            raise ArtifactError(f"{problems[0]}; restore it, or make {folder} again by its recipe with --force")


def finished(recipe: Recipe) -> Artifact | None:
    """The artifact of the finished run of exactly this recipe, or None."""
    if status(recipe.output_dir, recipe_fingerprint(recipe)) == "finished":
        return load_artifact(recipe.output_dir)
    return None


def move_aside(folder: Path) -> Path:
    """Move a run folder to ``NAME.previous``, replacing the one before; refuse a folder that is no run."""
    if not any((folder / name).exists() for name in (RUN_FILE, ARTIFACT_FILE)):
        raise RecipeError(f"{folder}: holds files that are no chatalign run; give another `output_dir`")
    previous = folder.with_name(folder.name + ".previous")
    if previous.exists():
        shutil.rmtree(previous)
    folder.rename(previous)
    return previous


def _read_run_file(folder: Path) -> dict[str, Any]:
    try:
        begun = json.loads((folder / RUN_FILE).read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return begun if isinstance(begun, dict) else {}
