"""Activations kept in the host's memory between forward and backward pass (``train.activation_offloading``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Smaller tensors cost more to move than they free.
_SMALLEST_BYTES = 256 * 2**10


class OffloadedActivations(saved_tensors_hooks):
    """A context in which what the forward pass saves is moved to pinned host memory, and back where it is needed.

    ``torch.autograd.graph.save_on_cpu`` would move the weights too, which are saved for the backward pass as well.
    Weights, and the half-precision copies that autocast makes of them, stay: the copies are known by their shape.
    Copies run on the compute stream, so that no tensor is freed or read too early; a step takes longer.
    """

    def __init__(self, model: nn.Module, *, device_type: str = "cuda", smallest_bytes: int = _SMALLEST_BYTES) -> None:
        weights = [p for p in model.parameters() if p.dim() > 1]
        self._weight_shapes = {shape for p in weights for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
        self._weight_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._device_type, self._smallest = device_type, smallest_bytes
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if not self._moves(tensor):
            return tensor
        pinned = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned)
        return tensor.device, copy.copy_(tensor, non_blocking=pinned)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, copy = packed
        back: Tensor = copy.to(device, non_blocking=True)
        return back

    def _moves(self, tensor: Tensor) -> bool:
        return (
            tensor.device.type == self._device_type
            and tensor.numel() * tensor.element_size() >= self._smallest
            and tuple(tensor.shape) not in self._weight_shapes
            and tensor.untyped_storage().data_ptr() not in self._weight_storages
        )
