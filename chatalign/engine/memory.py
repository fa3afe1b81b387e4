"""How much memory a training step will take, and how many layers must be checkpointed for it to fit.

What a layer keeps for its backward pass depends on architecture, precision, adapters and kernels, so it is measured
on a few tokens; everything here keeps an amount per token, so the rest is arithmetic.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from chatalign.engine.attention import segment_inputs
from chatalign.engine.isolation import unwrapped
from chatalign.engine.layers import decoder_layers

# Bytes of optimizer state for each trained weight; others count as AdamW's two float32 moments.
_OPTIMIZER_BYTES = {"8bit": 2.0, "paged": 0.0, "sgd": 0.0, "adafactor": 0.1, "lion": 4.0}
_ADAMW_BYTES = 8.0
# Of the device's memory: what kernels, the allocator's gaps and the CUDA context take beside what is counted.
_USABLE = 0.85
_PROBE_TOKENS = 61  # no weight has this shape


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What a training step holds. Bytes; those of activations for each token of a micro-batch."""

    weights: int  # all roles' weights, as they are stored
    trained: int  # number of trained weights
    layers: int
    layer_bytes_per_token: float  # what one layer keeps for its backward pass
    input_bytes_per_token: float  # what a checkpointed layer keeps: its input
    other_bytes_per_token: float  # embedding, last norm and the loss head's hidden states
    head_bytes: int  # logits, or the chunks of them
    half: bool  # under autocast, which keeps half-precision copies of the trained weights
    optimizer_bytes: float  # for each trained weight

    def total(self, tokens: int, checkpointed: int) -> float:
        """Bytes at the peak of a step with micro-batches of `tokens`, the first `checkpointed` layers recomputed.

        Weights, gradients (float32), optimizer, autocast's copies; then the kept layers, the checkpointed layers'
        inputs, and one layer that is being recomputed.
        """
        fixed = self.weights + self.trained * (4 + self.optimizer_bytes + (2 if self.half else 0)) + self.head_bytes
        kept = (self.layers - checkpointed) * self.layer_bytes_per_token + checkpointed * self.input_bytes_per_token
        recomputed = self.layer_bytes_per_token if checkpointed else 0.0
        return fixed + tokens * (kept + recomputed + self.other_bytes_per_token)


def layers_to_checkpoint(step: StepMemory, tokens: int, available: float) -> int:
    """The fewest layers whose recomputation lets a step fit into `available` bytes; all where none is enough.

    None first: a checkpointed layer is computed twice, a third more work for it.
    """
    for count in range(step.layers + 1):
        if step.total(tokens, count) <= available * _USABLE:
            return count
    return step.layers


def optimizer_bytes(optim: str) -> float:
    """Bytes of state for each trained weight, by ``TrainingArguments.optim``'s name."""
    return next((size for name, size in _OPTIMIZER_BYTES.items() if name in optim), _ADAMW_BYTES)


def give_back_freed() -> None:
    """Hand the host memory that was freed back to the system, where the C library can (glibc; nothing elsewhere)."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def available_bytes(device: torch.device) -> int | None:
    """A GPU's free memory and what this process has of it already; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def measure_step(
    model: nn.Module, *, optim: str, half: bool, head_bytes: int, beside: Sequence[nn.Module] = ()
) -> StepMemory:
    """Run a few tokens forward under the caller's autocast and count what each layer keeps; leaves no gradients.

    `beside` are other models in the device's memory, such as a reference.
    """
    layers = decoder_layers(model)
    kept, outside = _kept_by_layer(model, layers)
    hidden = unwrapped(model).get_input_embeddings().weight.shape[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    everything = [p for module in (model, *beside) for p in module.parameters()]
    return StepMemory(
        weights=sum(p.numel() * p.element_size() for p in everything),
        trained=sum(p.numel() for p in trained),
        layers=len(layers),
        layer_bytes_per_token=max(kept) / _PROBE_TOKENS,
        input_bytes_per_token=4.0 * hidden,
        other_bytes_per_token=outside / _PROBE_TOKENS + 4.0 * hidden,
        head_bytes=head_bytes,
        half=half,
        optimizer_bytes=optimizer_bytes(optim),
    )


def _kept_by_layer(model: nn.Module, layers: list[Any]) -> tuple[list[int], int]:
    """Bytes that each layer keeps for the backward pass of the probe's tokens, and those kept outside of layers."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    kept, outside, seen = [0] * len(layers), 0, set()
    inside: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        nonlocal outside
        place = tensor.untyped_storage().data_ptr()
        if place in weights or place in seen or tuple(tensor.shape) in shapes:
            return tensor
        seen.add(place)
        held.append(tensor)  # else its place could be another tensor's later
        size = tensor.untyped_storage().nbytes()
        if inside:
            kept[inside[-1]] += size
        else:
            outside += size
        return tensor

    held: list[Tensor] = []
    hooks = []
    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda _module, _inputs, i=i: inside.append(i)))
        hooks.append(layer.register_forward_hook(lambda _module, _inputs, _output: (inside.pop(), None)[1]))
    base = unwrapped(model)
    backbone = getattr(base, base.base_model_prefix)
    device = base.get_input_embeddings().weight.device
    tokens = torch.arange(_PROBE_TOKENS, device=device) % base.get_input_embeddings().weight.shape[0]
    batch = {
        "input_ids": tokens[None],
        "position_ids": torch.arange(_PROBE_TOKENS, device=device)[None],
        "segments": torch.tensor([[0, _PROBE_TOKENS, 0, 0]]),
    }
    try:
        with torch.enable_grad(), saved_tensors_hooks(count, lambda tensor: tensor):
            backbone(**segment_inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return kept, outside
