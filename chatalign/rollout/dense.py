"""One matrix a linear layer while replies are drawn on a CPU.

A LoRA layer is three products and a frozen weight is rounded to autocast's precision again at every call: both cost
little in a batch of thousands of tokens and more than the product itself in a step of a few rows (measured: 1.7 × the
time of a rollout). Elsewhere a second copy of a large base would not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Inside, LoRA layers of `model` compute x (W + s B A)ᵀ with one product, and frozen weights are rounded once.

    For no-gradient passes on a CPU; anywhere else, and for layers that are more than that (DoRA, quantized), nothing
    changes. Weights are those at entry. Afterwards every layer is as before.
    """
    changed: list[tuple[nn.Module, Any]] = []
    try:
        with torch.no_grad():
            for layer, weight in _dense(model):
                changed.append((layer, vars(layer).get("forward")))
                vars(layer)["forward"] = MethodType(_forward(weight), layer)
        yield
    finally:
        for layer, before in changed:
            if before is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = before


def _dense(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """(layer, its one matrix) where that saves work."""
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    found: list[tuple[nn.Module, Tensor]] = []
    inside: set[int] = set()
    with torch.autocast("cpu", enabled=False):
        for module in model.modules():
            if id(module) in inside:
                continue
            if _is_lora(module):
                inside |= {id(child) for child in module.modules()}
                if _is_plain(module):
                    merged = _merged(module)
                    found.append((module, merged.to(half) if half else merged))
            elif type(module) is nn.Linear and half and _is_frozen(module):
                found.append((module, module.weight.to(half)))
    return found


def _is_lora(module: Any) -> bool:
    # Who has such a layer has imported peft; who hasn't is spared 100 MB.
    lora = sys.modules.get("peft.tuners.lora")
    return lora is not None and isinstance(module, lora.Linear)


def _is_frozen(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad


def _is_plain(layer: Any) -> bool:
    """Whether the active adapters are products on a frozen float32 matrix and nothing else."""
    base = layer.get_base_layer()
    if type(base) is not nn.Linear or not _is_frozen(base) or layer.merged:
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return not any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in names)


def _merged(layer: Any) -> Tensor:
    weight: Tensor = layer.get_base_layer().weight
    if layer.disable_adapters:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name)
    return weight


def _forward(weight: Tensor) -> Callable[..., Tensor]:
    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = layer.get_base_layer() if _is_lora(layer) else layer
        return F.linear(x, weight, base.bias)

    return forward
