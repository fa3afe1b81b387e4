"""The rollout in a checkpoint: replies and their numbers, from which the remaining minibatches of a rollout go on."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from chatalign.artifact import write_json
from chatalign.engine.ppo_experience import Experience
from chatalign.errors import CheckpointError

TENSORS_FILE = "experience.safetensors"
LISTS_FILE = "experience.json"


def save_experience(experience: Experience, folder: Path) -> None:
    """Write a rollout into a checkpoint; the manifest that seals the checkpoint covers both files."""
    from safetensors.torch import save_file

    values: dict[str, Any] = vars(experience)
    tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    save_file(tensors, folder / TENSORS_FILE)
    write_json(folder / LISTS_FILE, {name: value for name, value in values.items() if name not in tensors})


def load_experience(folder: Path) -> Experience | None:
    """The rollout that a checkpoint was in the middle of, or None: it was between two rollouts.

    Raises CheckpointError where one of the two files is missing or holds something else.
    """
    from safetensors.torch import load_file

    paths = folder / TENSORS_FILE, folder / LISTS_FILE
    if not any(path.is_file() for path in paths):
        return None
    if not all(path.is_file() for path in paths):
        raise CheckpointError(f"{folder}: holds half a rollout; delete the checkpoint to go on from the one before it")
    values = load_file(paths[0]) | json.loads(paths[1].read_text("utf-8"))
    if values.keys() != {field.name for field in fields(Experience)}:
        raise CheckpointError(f"{folder}: not the rollout of this version; delete the checkpoint")
    return Experience(**values)
