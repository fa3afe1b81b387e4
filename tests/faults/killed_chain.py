"""A chain in a process of its own that counts what it does to files and weights, and kills itself at a given point.

SIGKILL leaves no time to tidy up. A point lies before a file is opened to be written, renamed, removed, or synced once
it is written, before a folder is made or removed, behind a file that no Python code writes (safetensors, torch, arrow),
and at each optimizer step. Up to the next point only the file that was opened last changes: a kill may cut it in half.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.ipc
import safetensors.torch
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[2]  # shipped recipes name their rows from there
# What a forkserver imports once: a start costs more than what is trained here. (It looks for nothing beside the tests.)
PRELOADED = [
    *("chatalign.pipeline", "chatalign.sft", "chatalign.reward", "chatalign.dpo", "chatalign.ppo", "chatalign.report"),
    *("transformers.models.llama.modeling_llama", "peft.tuners.lora", "matplotlib.figure", "matplotlib.projections"),
    *("matplotlib.backends.backend_agg", "PIL.PngImagePlugin"),
]
_MOVES = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir", "os.link": "link"}


@dataclass(frozen=True)
class Point:
    """One point of a run: in which stage and part of it, what comes next, and which file was being written."""

    stage: str
    part: str  # open, train, save STEP, finish
    label: str
    writing: str = ""

    @property
    def place(self) -> str:
        """Stage and part, which every start of the stage goes through in the same way."""
        return f"{self.stage} {self.part}"


@dataclass(frozen=True)
class Kill:
    """To be killed at the `number`-th point of a place ("" counts all); `half` cuts the file that is being written."""

    number: int
    place: str = ""
    half: bool = False


class Points:
    """Counts points from when it is installed; `kill` is the last of them."""

    def __init__(self, folder: Path, kill: Kill | None) -> None:
        self.folder, self.kill, self.process = str(folder), kill, os.getpid()
        self.stage, self.part = "", "open"
        self.seen: list[Point] = []
        self._counts: Counter[str] = Counter()
        self._writing: tuple[str, int] | None = None  # the file that was opened last, and its size before

    def reach(self, label: str) -> None:
        """One more point; the process ends here where it is the one."""
        if os.getpid() != self.process:
            return
        writing, self._writing = self._writing, None
        point = Point(self.stage, self.part, label, Path(writing[0]).name if writing else "")
        self.seen.append(point)
        self._counts.update(("", point.place))
        if self.kill is not None and self._counts[self.kill.place] == self.kill.number:
            if self.kill.half and writing is not None:
                os.truncate(writing[0], (writing[1] + os.path.getsize(writing[0])) // 2)
                if writing[0].endswith(".safetensors"):  # whose writer renames it when it is whole
                    os.rename(writing[0], Path(writing[0]).with_name(".tmpKilled"))
            os.kill(self.process, signal.SIGKILL)

    def install(self) -> None:
        """Count from now on, to the end of the process."""
        sys.addaudithook(self._audit)
        self._around(os, "fsync", before=lambda file: self._sync(file))
        self._around(torch, "save", after=lambda _, file, *__, **___: self._written(file))
        self._around(safetensors.torch, "serialize_file", after=lambda _, file, *__, **___: self._written(file))
        self._around(pyarrow.ipc, "new_stream", after=lambda file, *_, **__: self._written(file, still=True))
        register_optimizer_step_pre_hook(lambda *_: self._step())
        self._follow_parts()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._opened(*arguments)
        elif event == "os.mkdir" and os.path.isdir(arguments[0]):
            return  # it was there
        elif event in _MOVES:
            # rmtree removes what lies in a folder that it holds open
            self._reach(_MOVES[event], arguments[0], arguments[-1] if event in ("os.remove", "os.rmdir") else -1)

    def _opened(self, path: Any, mode: str | None, flags: int) -> None:
        to_write = isinstance(path, str | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR)
        if to_write and self._reach("open", path):
            kept = os.path.exists(path) and not flags & os.O_TRUNC
            self._writing = (str(path), os.path.getsize(path) if kept else 0)

    def _sync(self, file: int) -> None:
        if self._writing is not None:
            self._reach("sync", f"/proc/self/fd/{file}")

    def _reach(self, what: str, path: Any, folder: int = -1) -> bool:
        """A point where `path`, in an open folder or not, lies in ours."""
        within = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
        place = os.path.join(within, os.fspath(path))
        place = os.readlink(place) if place.startswith("/proc/self/fd/") else os.path.abspath(place)
        if not place.startswith(self.folder):
            return False
        self.reach(f"{what} {os.path.relpath(place, self.folder)}")
        return True

    def _written(self, file: Any, *, still: bool = False) -> None:
        """Behind a write that Python doesn't see; `still`: the file is open, and grows until the next point."""
        if isinstance(file, str | os.PathLike) and str(file).startswith(self.folder):
            self._writing = (str(file), 0)
            if not still:
                self.reach(f"written {os.path.relpath(file, self.folder)}")

    def _around(self, owner: Any, name: str, *, before: Any = None, after: Any = None) -> None:
        right: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            done = right(*args, **kwargs)
            if after is not None:
                after(*args, **kwargs)
            return done

        setattr(owner, name, watched)

    def _step(self) -> None:
        self.part = "train"
        self.reach("step")

    def _follow_parts(self) -> None:
        """Say of each point in which stage and part of it it lies."""
        from chatalign import pipeline
        from chatalign.engine.sealed import SealedTrainer

        def opened(recipe: Any, *_: Any) -> None:
            self.stage, self.part = Path(recipe.output_dir).name, "open"

        def saving(trainer: Any, *_: Any) -> None:
            self.part = f"save {trainer.state.global_step}"

        self._around(pipeline, "run_stage", before=opened)
        self._around(SealedTrainer, "_save_checkpoint", before=saving, after=lambda *_: setattr(self, "part", "train"))
        self._around(SealedTrainer, "train", after=lambda *_, **__: setattr(self, "part", "finish"))


def run(
    recipe: str,
    only: Collection[str] | None,
    environment: Mapping[str, str],
    kill: Kill | None,
    points: str | None,
) -> None:
    """Run a pipeline, or some of its stages, in this process; it is killed, or writes all its points to a file."""
    import datasets

    from chatalign.pipeline import run_pipeline

    gc.freeze()  # what the server imported is no garbage: looking through it takes longer than a stage here
    os.environ.update(environment)
    os.chdir(ROOT)
    datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    torch.set_num_threads(1)
    watched = Points(Path(recipe).parent, kill)
    watched.install()
    run_pipeline(recipe, only=only)
    if points is not None:
        Path(points).write_text(json.dumps([vars(point) for point in watched.seen]))
