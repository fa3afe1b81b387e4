"""What a checkpoint keeps of a model: its trainable weights, in full precision, by name. The rest is the base's.

One file for full models, adapters and reward heads alike. transformers would save every adapter of a model in a
folder of its own, the frozen reference too, and read them back by folder name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from chatalign.errors import CheckpointError

TRAINABLE_FILE = "trainable.safetensors"


def save_trainable(model: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Write the weights that require a gradient into `folder`, whole.

    Every process of a sharded model calls it; the one with `write` writes.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if write:
                tensors[name] = whole.detach().cpu().contiguous()
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TRAINABLE_FILE, metadata={"format": "pt"})


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Read them back in place; raises CheckpointError where names or shapes are not those of the model."""
    from safetensors.torch import load_file

    path = folder / TRAINABLE_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; delete the checkpoint to go on from the one before it")
    saved = load_file(path)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != wanted.keys() or any(saved[name].shape != p.shape for name, p in wanted.items()):
        raise CheckpointError(f"{path}: not the weights of this model; delete the checkpoint and start the run anew")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if isinstance(parameter, DTensor):
                whole = saved[name].to(parameter.device)
                # Each process cuts its own part out: all have read the same file.
                parameter.copy_(
                    distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                )
            else:
                parameter.copy_(saved[name])
