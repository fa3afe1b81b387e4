"""A chain in a process of its own that counts what it does to files and weights, and kills itself at a given count.

SIGKILL leaves no time to tidy up. What is counted: files opened to be written, synced, renamed, deleted, tensors
written, and optimizer steps: every point at which a save is half done, and every step between saves.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[2]  # shipped recipes name their rows from there
WRITES = frozenset("wax+")
# What a forkserver imports once: a start costs more than what is trained here. (It looks for nothing beside the tests.)
PRELOADED = ["chatalign.pipeline", "chatalign.sft", "chatalign.reward", "chatalign.dpo", "chatalign.ppo"]


class Points:
    """Counts points from when it is installed; `kill_at` of them is the last. `labels` says what each was."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self.folder, self.kill_at = folder, kill_at
        self.labels: list[str] = []

    def reach(self, label: str) -> None:
        """One more point; the process ends here where it is the one."""
        self.labels.append(label)
        if len(self.labels) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Count from now on, to the end of the process."""
        opened = builtins.open

        def watched_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if WRITES & set(mode) and self._ours(file):
                self.reach(f"open {self._name(file)}")
            return opened(file, mode, *args, **kwargs)

        builtins.open = watched_open  # type: ignore[assignment]
        self._watch(os, "fsync", lambda *_: "fsync")
        for module, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (shutil, "rmtree")):
            self._watch(module, name, lambda path, *_, name=name: f"{name} {self._name(path)}")
        self._watch(torch, "save", lambda _, file, *__: f"torch.save {self._name(file)}")
        self._watch(safetensors.torch, "save_file", lambda _, file, *__: f"save_file {self._name(file)}")
        register_optimizer_step_pre_hook(lambda *_: self.reach("step"))

    def _watch(self, module: Any, name: str, label: Callable[..., str]) -> None:
        right = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.reach(label(*args))
            done = right(*args, **kwargs)
            self.reach(f"after {label(*args)}")
            return done

        setattr(module, name, watched)

    def _ours(self, file: Any) -> bool:
        return isinstance(file, str | os.PathLike) and str(self.folder) in str(Path(file).absolute())

    def _name(self, file: Any) -> str:
        return Path(file).name if isinstance(file, str | os.PathLike) else type(file).__name__


def run(
    recipe: str, overrides: Mapping[str, Any], environment: Mapping[str, str], kill_at: int | None, labels: str
) -> None:
    """Run a pipeline in this process; it is killed at a point, or writes all its points' labels to a file."""
    import datasets

    from chatalign.pipeline import run_pipeline

    os.environ.update(environment)
    os.chdir(ROOT)
    datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    torch.set_num_threads(1)
    points = Points(Path(recipe).parent, kill_at)
    points.install()
    run_pipeline(recipe, overrides)
    Path(labels).write_text(json.dumps(points.labels))
