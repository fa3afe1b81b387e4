"""What is done to a model's repeated layers: compiled one by one, checkpointed some or all, given Liger's kernels."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch._functorch.config as functorch_config
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from chatalign.engine.attention import register
from chatalign.engine.isolation import unwrapped
from chatalign.engine.replaced import noting_replaced, replace
from chatalign.errors import ModelError

_BUDGET = 0.9  # of what the compiler would keep for the backward pass; far less would make products again


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The repeated layers, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module, *, checkpointed: int = 0) -> None:
    """Compile each layer for rows of any length; layers of one shape share what was compiled for the first.

    Attention runs outside, between two compiled parts: the segments differ in every batch, and each would be a
    recompilation. The first `checkpointed` layers are compiled in their parts, since the compiler leaves what a
    checkpoint wraps as it is where anything in it can't be compiled.

    On a CPU the compiler keeps what products give and makes elementwise results again: a quarter less kept, for 3 % of
    the time (measured at 25M).
    """
    register(opaque=True)
    if next(model.parameters()).device.type == "cpu":
        replace(functorch_config, "activation_memory_budget", _BUDGET)
    for i, layer in enumerate(decoder_layers(model)):
        for part in layer.children() if i < checkpointed else (layer,):
            part.compile(dynamic=True)


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Recompute the first `count` layers in the backward pass, and no others; ModelError where the model can't."""
    base = unwrapped(model)
    if not base.supports_gradient_checkpointing:
        raise ModelError(f"{type(base).__name__} has no gradient checkpointing; set it to false")
    # Under its older name before transformers 5.20, deprecated since.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for i, layer in enumerate(decoder_layers(base)):
        layer.gradient_checkpointing = i < count


def apply_liger(model: nn.Module, config: Mapping[str, bool]) -> bool:
    """Give a model Liger's norms, rotary embedding and MLP; False where Liger has none for its architecture."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    base: Any = unwrapped(model)
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    with noting_replaced(sys.modules[type(base).__module__]):  # its rotary embedding is the module's
        _apply_liger_kernel_to_instance(model=base, **config)
    return True
