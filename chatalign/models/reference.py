"""The frozen policy that KL and DPO are measured against, in whichever of three ways costs least memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chatalign.errors import GuardError

Way = Literal["adapter", "disabled", "copy"]
REFERENCE_ADAPTER = "reference"
WRONG_REFERENCE = "the reference is not the model that this run starts from"


class Reference:
    """The policy as it was at the start.

    ``adapter``: the adapter that the run started from, a second time and frozen, on the same base;
    ``disabled``: the base without its new adapter; ``copy``: a frozen copy of a fully trained model.
    """

    def __init__(self, policy: Any, *, way: Way, module: Any | None = None) -> None:
        if (module is not None) != (way == "copy"):
            raise ValueError("a reference that is a copy, and no other, needs `module`")
        self.way = way
        self.module = module  # an engine that shards models shards this one too
        self._policy = policy

    @contextmanager
    def use(self) -> Iterator[Any]:
        """The module to run as the reference: in eval mode, without gradients; the policy is as before afterwards."""
        if self.module is not None:
            device = next(self._policy.parameters()).device
            if next(self.module.parameters()).device != device:
                self.module.to(device)
            with torch.no_grad():
                yield self.module
            return
        was_training = self._policy.training
        self._policy.eval()
        name = None if self.way == "disabled" else REFERENCE_ADAPTER
        try:
            with torch.no_grad(), adapter_in_use(self._policy, name) as model:
                yield model
        finally:
            self._policy.train(was_training)

    def refuse_trained(self) -> None:
        """Raise GuardError where training the policy would move the reference: they share what is trained."""
        trained = {name: p for name, p in self._policy.named_parameters() if p.requires_grad and p.numel()}
        if self.module is not None:
            own = {p.data_ptr() for p in self.module.parameters()}
            shared = [name for name, p in self._policy.named_parameters() if p.numel() and p.data_ptr() in own]
            mend = "install the versions of constraints.txt"
        else:  # what belongs to no adapter is the base's, and is there without the adapter too
            adapters = set(self._policy.peft_config) - {REFERENCE_ADAPTER}
            shared = [name for name in trained if adapters.isdisjoint(name.split("."))]
            mend = "set lora.bias to none, or train the SFT adapter without biases"
        if shared:
            raise GuardError(f"{WRONG_REFERENCE}: they share {len(shared)} weights, such as {shared[0]}; {mend}")

    def refuse_moved(self, sha256_at_start: str) -> None:
        """Raise GuardError where the weights are not those whose `sha256` was taken at the start."""
        if self.sha256() != sha256_at_start:
            raise GuardError(
                f"{WRONG_REFERENCE}: its weights changed during training, so that the losses were wrong; let nothing "
                f"but the trainer change weights"
            )

    def sha256(self) -> str:
        """Hex sha256 of the reference's weights, names and bytes; the same all through a run."""
        return hash_tensors(self._tensors())

    def _tensors(self) -> Mapping[str, Tensor]:
        if self.module is not None:
            return dict(self.module.named_parameters())
        named = self._policy.named_parameters()
        if self.way == "adapter":
            return {name: p for name, p in named if REFERENCE_ADAPTER in name.split(".")}
        return {name: p for name, p in named if not p.requires_grad and "lora_" not in name}


@contextmanager
def adapter_in_use(model: Any, name: str | None) -> Iterator[Any]:
    """Run the peft model with adapter `name`, or without any; restores the active adapter and every gradient flag.

    peft itself freezes and thaws weights when it switches, which would take them from the optimizer's gradients.
    """
    active = model.active_adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if name is None:
            with model.disable_adapter():
                yield model
        else:
            model.set_adapter(name)
            _restore(flags)
            yield model
    finally:
        if model.active_adapter != active:
            model.set_adapter(active)
        _restore(flags)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over names, types and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}:{flat.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
