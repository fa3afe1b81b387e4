"""The last layer's MLP at the places that are read alone: exact, since after its attention no token sees another.

A pass over a flat batch says at which places it reads hidden states: those that predict a target, or hold a score. Of
the last layer, the norm and MLP behind the attention run on those rows, and elsewhere its output is 0, which nobody
reads. A layer is changed only where it is x + attention(norm(x)), then x + MLP(norm(x)), as its results show.

Shapes: T tokens, K places, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Where more of the places are read, copying rows costs what is saved (measured with three layers, at 0.7 to 0.9).
_MOST = 2 / 3
# A CPU's bf16 kernels are compiled for each new shape: 1.5 × the time of a step's products (measured, AMX).
HALF_MULTIPLE = 128
_NARROWED = "chatalign_narrowed"
_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


@dataclass(frozen=True)
class Places:
    """Places of a row that are read after the last layer; one may occur twice (K counts it twice)."""

    index: Tensor  # (K,)
    once: Tensor  # (K, 1) booleans: false at a place's other occurrences, which add nothing

    @classmethod
    def of(cls, index: Tensor, total: int) -> Places:
        """Places of a row of `total` tokens; no value is looked at, so that a GPU needn't be waited for."""
        order = torch.arange(len(index), device=index.device)
        chosen = torch.zeros(total, dtype=order.dtype, device=index.device).index_copy_(0, index, order)
        return cls(index, (chosen[index] == order).unsqueeze(-1))


def places_read(places: Tensor, total: int) -> Places | None:
    """Places (K,) of a row of `total` tokens, under a CPU's autocast rounded up in number; None where they are most."""
    if places.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        places = torch.cat((places, places[-1:].expand(-len(places) % HALF_MULTIPLE)))
    return Places.of(places, total) if len(places) <= _MOST * total else None


def narrow_last_layer(model: nn.Module, same: Callable[[nn.Module], bool]) -> bool:
    """Let the last layer run where it is read; False, and nothing changed, where it can't.

    `same` runs a tiny batch both ways, and says of that layer whether the hidden states agree. Again does nothing new.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or {name for name, _ in layers[-1].named_children()} != _PARTS or "forward" in vars(layers[-1]):
        return False
    layer = layers[-1]
    own: Any = type(layer)
    if hasattr(own, _NARROWED):
        return True
    layer.__class__ = _narrowed(own)
    try:
        fits = same(layer)
    except (TypeError, ValueError, RuntimeError, IndexError):
        fits = False
    if not fits:
        layer.__class__ = own
    return fits


@cache
def _narrowed(own: Any) -> type[GradientCheckpointingLayer]:
    """A layer's class with the narrow pass. A class, since transformers checkpoints what a class's `forward` is."""

    def forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Any:  # transformers' signature
        places: Places | None = getattr(kwargs.get("segments"), "places", None)
        if places is None:
            return own.forward(layer, hidden_states, **kwargs)
        return _narrow_pass(layer, places, hidden_states, **kwargs)

    # Under the same name, by which FSDP finds the layers to wrap.
    return type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__, _NARROWED: True})


def _narrow_pass(layer: Any, places: Places, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    index, once = places.index.to(hidden_states.device), places.once.to(hidden_states.device)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    rows_1KD = (hidden_states + attended).index_select(1, index)
    rows_1KD = rows_1KD + layer.mlp(layer.post_attention_layernorm(rows_1KD))
    return rows_1KD.new_zeros(hidden_states.shape).index_add(1, index, rows_1KD * once)
