"""What a saved model must be, and an adapter as it is loaded: nothing trained is missing, nothing read is random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatalign.errors import GuardError, ModelError
from chatalign.models.resolve import Resolved

_LORA_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def refuse_unsaved(model: Any, saved: Mapping[str, Tensor], adapter: str) -> None:
    """Raise GuardError where a weight that trains is none of those that saving `adapter` writes.

    peft writes LoRA weights and ``modules_to_save``; an embedding that was thawed by other means trains and is lost.
    """
    others = set(model.peft_config) - {adapter}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and others.isdisjoint(name.split(".")) and _saved_as(name, adapter) not in saved
    ]
    if lost:
        raise GuardError(
            f"{len(lost)} of the weights that train are not saved with the adapter, such as {lost[0]}; name their "
            f"modules in lora.modules_to_save"
        )


def _saved_as(name: str, adapter: str) -> str:
    """The name that peft saves an adapter's weight under."""
    if ".lora_magnitude_vector." in name:  # DoRA's, which peft saves without the inner name
        name = name.removesuffix(".weight")
    return name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".").removesuffix(f".{adapter}")


def other_adapter(folder: Path, what: str, mend: str) -> ModelError:
    """The error for an adapter that, loaded from `folder`, isn't what was trained."""
    return ModelError(f"{folder}: the adapter would not work as it was trained: {what}; {mend}")


def refuse_no_effect(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError where a saved adapter's every product B A is 0 and it holds nothing else."""
    named = set(tensors)
    for name in tensors:
        for a, b in _LORA_PAIRS:
            if f".{a}." in name or name.endswith(f".{a}"):
                twin = name.replace(a, b)
                if twin not in tensors or (tensors[name].any() and tensors[twin].any()):
                    return
                named -= {name, twin}
    if not named and tensors:
        raise other_adapter(folder, "every product of its matrices is 0, so that it does nothing", "train it")


def refuse_merge_into_quantized(config: Any, resolved: Resolved) -> None:
    """Raise ModelError where `config` says that the base of an adapter is stored quantized."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{resolved.base}: its weights are stored quantized, and merging into them loses what was learned; set "
            f"name_or_path in {resolved.adapter}/base_model.json to the 16-bit model"
        )


def refuse_unread(folder: Path, saved: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Raise ModelError where a peft model's adapter, as it is now, isn't what was read from `folder`."""
    for name, tensor in saved.items():
        now = loaded[name].detach()
        if not now.is_meta and not torch.equal(tensor.to(now.device, now.dtype), now):
            raise other_adapter(folder, f"{name} was not read from its file", "install the peft of constraints.txt")


def whole_shapes(model: Any, adapter: str | None = None) -> dict[str, torch.Size]:
    """Name and whole shape of each weight that saving `model` writes, or that training its `adapter` moves.

    Tied weights count once. Empty where FSDP 1 holds the weights flat, and their shapes aren't known.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return {}
    named = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    if adapter is None:
        return named
    others = set(model.peft_config) - {adapter}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and others.isdisjoint(name.split("."))}
    return {_saved_as(name, adapter): shape for name, shape in named.items() if name in trained}


def refuse_incomplete(shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor], folder: Path) -> None:
    """Raise GuardError where the safetensors files of `folder` don't hold `state`, or `state` not all of `shapes`.

    `state` is what was gathered, each tied weight once. Values are compared bit for bit, a tensor at a time; where a
    library stores weights under other names, only their number is.
    """
    from safetensors import safe_open

    if lost := [name for name, shape in shapes.items() if name not in state or state[name].shape != shape]:
        raise _lost(folder, lost)
    left = dict(state)
    under_other_names = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open's handle is no mapping
                saved = file.get_tensor(name)
                if name not in left:
                    under_other_names += saved.numel()
                elif not _same(saved, left.pop(name)):
                    raise _lost(folder, [name])
    if under_other_names < sum(tensor.numel() for tensor in left.values()):
        raise _lost(folder, sorted(left))


def _same(saved: Tensor, live: Tensor) -> bool:
    return saved.dtype == live.dtype and torch.equal(saved, live.detach().cpu())


def _lost(folder: Path, names: list[str]) -> GuardError:
    return GuardError(
        f"{folder}: {len(names)} of the model's weights are not in the saved files as they are in memory, such as "
        f"{names[0]}; check the disk, launch with one of accelerate_configs, and run again: it goes on from its last "
        f"checkpoint"
    )
