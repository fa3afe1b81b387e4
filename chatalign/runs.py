"""Run folders: what a recipe's run is called, whether it is finished, and how a run is opened.

A run's *fingerprint* covers everything that its result depends on: the recipe without its place and reporting,
the parents' fingerprints, the contents of local data and model files, and chatalign's version. Where a finished
run has the same fingerprint there is nothing to do; where an unfinished one has, it goes on from its checkpoint;
anything else in the folder is moved aside to ``NAME.previous``, never deleted unasked. Light: no torch here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from chatalign.artifact import (
    CHECKPOINTS,
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
from chatalign.inputs import Inputs, base_model, inputs_fingerprint, parents_of, recipe_fingerprint, run_inputs
from chatalign.recipe import Recipe, StageRecipe
from chatalign.unfinished import (
    RECIPE_FILE,
    allowed_processes,
    changed,
    earlier_fingerprints,
    fingerprints,
    move_aside,
    read_run_file,
    take_allowed,
)

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
    """An opened run: where it writes, who it is, and what it depends on.

    `earlier` are the fingerprints that it had before changes that were allowed, `allowed_processes` how many it was
    last allowed to go on with where that is another number than before.
    """

    folder: Path
    run_id: str
    fingerprint: str
    parents: list[Parent]
    inputs: Inputs = field(default_factory=dict)
    earlier: frozenset[str] = frozenset()
    allowed_processes: int | None = None

    @property
    def model_folder(self) -> Path:
        """Where the finished model or adapter goes."""
        return self.folder / MODEL_FOLDER

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / CHECKPOINTS

    def made_from(self, recipe: StageRecipe) -> dict[str, Any]:
        """What a checkpoint says of the run that wrote it, besides its id."""
        base = base_model(recipe.model, self.inputs) if self.inputs else None
        return {
            "fingerprint": self.fingerprint,
            "recipe": recipe.model_dump(mode="json"),
            "data": {read["path"]: read["sha256"] for read in self.inputs.get("data", [])},
            "base_model": None if base is None else base.model_dump(),
            "parents": [parent.model_dump() for parent in self.parents],
        }

    def take_allowed(self, recipe: StageRecipe, *, step: int) -> None:
        """Note that the run goes on from `step` under the change that it was allowed, if any; one process does."""
        take_allowed(self.folder, recipe.model_dump(mode="json"), fingerprint=self.fingerprint, step=step)


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
    begun = read_run_file(folder)
    return "resumable" if begun and run_fingerprint in fingerprints(begun) else "stale"


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
    inputs = run_inputs(recipe)
    mark, parents = inputs_fingerprint(inputs), parents_of(recipe)
    if is_main_process():
        _refuse_altered(parents)
    state = status(folder, mark)
    if state == "resumable":
        return _go_on(folder, inputs, mark, parents)
    if state == "stale" and (found := changed(recipe)) is not None and (refusal := found.refusal()) is not None:
        raise refusal
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
    (made / RECIPE_FILE).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "utf-8")
    begun = {"run_id": run_id, "stage": recipe.stage, "fingerprint": mark, "inputs": inputs}
    write_json(made / RUN_FILE, begun)
    os.replace(made, place)
    sync(place.parent)
    return Run(folder=folder, run_id=run_id, fingerprint=mark, parents=parents, inputs=inputs)


def _go_on(folder: Path, inputs: Inputs, mark: str, parents: list[Parent]) -> Run:
    """The unfinished run in `folder`; its record gets what an older chatalign left out."""
    begun = read_run_file(folder)
    recorded = {"inputs": inputs} | begun if begun["fingerprint"] == mark else dict(begun)
    if begun.get("allowed", {"fingerprint": mark})["fingerprint"] != mark:
        del recorded["allowed"]  # and not taken up: the command is the one of before again
    if is_main_process() and recorded != begun:
        write_json(folder / RUN_FILE, recorded)
    return Run(
        folder=folder,
        run_id=str(begun["run_id"]),
        fingerprint=mark,
        parents=parents,
        inputs=inputs,
        earlier=earlier_fingerprints(begun, mark),
        allowed_processes=allowed_processes(recorded),
    )


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
