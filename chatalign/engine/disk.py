"""A disk that is full while a run saves: named in one line, with what is missing, and nothing half-written is left."""

from __future__ import annotations

import errno
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from chatalign.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors write by themselves, and give a number or a sentence in place of an errno.
_FULL_IN_WORDS = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b|PytorchStreamWriter failed|iostream error")


@contextmanager
def room_for(folder: Path, needed: int, what: str) -> Iterator[None]:
    """Write `what`, about `needed` bytes, into `folder` inside.

    Where the disk has no room for it CheckpointError says how much is missing, and the folder is taken away. Other
    errors pass.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not (isinstance(error, OSError) and error.errno in _FULL) and not _FULL_IN_WORDS.search(str(error)):
            raise
        shutil.rmtree(folder, ignore_errors=True)  # its bytes count as free below
        raise CheckpointError(
            f"{folder.parent}: no room for {what} ({_missing(folder, needed)}); make some, and run the same command, "
            f"which goes on from the last checkpoint"
        ) from error


def _missing(folder: Path, needed: int) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY:
        return f"it takes {_megabytes(needed)}, and no file may be larger than {_megabytes(limit)}: ulimit -f"
    place = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    return (
        f"it takes {_megabytes(needed)}, {_megabytes(free)} are free, {_megabytes(max(needed - free, 0))} are missing"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def checkpoint_bytes(model: nn.Module, optimizer: Optimizer | None) -> int:
    """What a checkpoint takes: the weights that train, and the optimizer's states."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    states = [] if optimizer is None else [state for held in optimizer.state.values() for state in held.values()]
    return weights + sum(state.nbytes for state in states if hasattr(state, "nbytes"))


def model_bytes(model: nn.Module) -> int:
    """What the finished model takes at the most: all weights, of an adapter those that train."""
    adapter = hasattr(model, "peft_config")
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not adapter)
