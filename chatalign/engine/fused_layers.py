"""On a CPU: a model's norms, rotary embedding, gated units and LoRA layers take :mod:`chatalign.maths.fused`.

A module is changed only where the fused formula gives what the module itself gives on random inputs and weights, so
that a look-alike (Gemma's norm scales by 1 + weight) keeps its own. What a GPU uses instead is Liger's kernels.
"""

from __future__ import annotations

import sys
from inspect import signature
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.func import functional_call

from chatalign.engine.isolation import unwrapped
from chatalign.engine.replaced import replace
from chatalign.maths import fused

_CLOSE = 1e-5
_ROTARY = "apply_rotary_pos_emb"
_BEFORE_LINEARS = "chatalign_before_linears"


def fuse_layers(model: nn.Module, *, lora_alone: bool = False) -> int:
    """Give `model` the fused functions where they fit; returns how many modules took one. Again does nothing new.

    `lora_alone` is for layers that will be compiled: the compiler fuses the others itself.
    """
    changed = 0
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        for module in model.modules():
            if "forward" in vars(module):
                continue
            for fits, forward in ((_is_lora, _lora_forward),) if lora_alone else _FUSED:
                if fits(module):
                    vars(module)["forward"] = MethodType(forward, module)  # bound: a deep copy runs its own weights
                    changed += 1
                    break
        if not lora_alone:
            for layer in model.modules():
                _mark_norms_before_linears(layer)
            _fuse_rotary(unwrapped(model))
    return changed


def _norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != torch.float32 or norm.weight.dtype != torch.float32:
        return type(norm).forward(norm, hidden_states)
    autocast = getattr(norm, _BEFORE_LINEARS, False) and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else None
    return fused.rms_norm(hidden_states, norm.weight, norm.variance_epsilon, dtype)


def _mark_norms_before_linears(layer: nn.Module) -> None:
    """Let a pre-norm layer's two norms round under autocast: the linear layers after them would, each for itself."""
    norms = {name: child for name, child in layer.named_children() if name.endswith("norm")}
    if norms.keys() == {"input_layernorm", "post_attention_layernorm"}:
        for norm in norms.values():
            setattr(norm, _BEFORE_LINEARS, True)


def _is_norm(module: Any) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or weight.is_meta:
        return False
    if len(signature(type(module).forward).parameters) != 2:  # a gated norm, whose gate may be left out
        return False
    x, other = torch.randn(5, len(weight)), torch.randn(len(weight))
    own = functional_call(module, {"weight": other}, (x,))
    return _same(own, fused.rms_norm(x, other, eps))


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    if _trains_as_it_stands(down):
        return fused.swiglu_linear(gate, up, down.weight, down.bias)
    out: Tensor = down(fused.swiglu(gate, up))
    return out


def _trains_as_it_stands(layer: nn.Module) -> bool:
    """Whether a layer is a linear one and no more: no adapter, not quantised or sharded, nobody listening."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.requires_grad
        and "forward" not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _is_gated(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Module) for part in parts) or any(p.is_meta for p in module.parameters()):
        return False
    inputs = getattr(parts[0], "in_features", None)
    if not isinstance(inputs, int) or any(p.dtype != torch.float32 for p in module.parameters()):
        return False
    x, training = torch.randn(1, 3, inputs), module.training
    module.training = True  # a dropout that it has of its own shows
    own = type(module).forward(module, x)
    module.training = training
    return _same(own, _mlp_forward(module, x))


def _lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # PEFT's own signature
    names = layer.active_adapters
    plain = not (layer.disable_adapters or layer.merged or args or kwargs) and len(names) == 1
    if not plain or not _is_plain(layer, names[0]):
        return type(layer).forward(layer, x, *args, **kwargs)
    name, base = names[0], layer.get_base_layer()
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return fused.lora_linear(x, base.weight, base.bias, a, b, layer.scaling[name])


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter is there and is x Aᵀ Bᵀ alone: no dropout, no DoRA or other variant, no bias, none in half."""
    base = layer.get_base_layer()
    return (
        name in layer.lora_A
        and base.weight.dtype == layer.lora_A[name].weight.dtype == torch.float32
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
        and not any(p.requires_grad for p in base.parameters())
    )


def _is_lora(module: Any) -> bool:
    # Quantised layers are other classes of PEFT's, and their weights no plain matrices.
    return type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear


def _fuse_rotary(base: nn.Module) -> None:
    """In the module that the model's class is of, as Liger does: the function is a global that attention looks up."""
    modeling: Any = sys.modules[type(base).__module__]
    own = getattr(modeling, _ROTARY, None)
    if own is None or own is apply_rotary:
        return
    if list(signature(own).parameters) != list(signature(apply_rotary).parameters):
        return
    q, k, angles = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 5, 4).repeat(1, 1, 2)
    if _turns_a_part(own, q, k):
        return
    theirs = own(q, k, angles.cos(), angles.sin())
    if all(map(_same, theirs, apply_rotary(q, k, angles.cos(), angles.sin()))):
        replace(modeling, _ROTARY, apply_rotary)


def _turns_a_part(own: Any, q: Tensor, k: Tensor) -> bool:
    """Whether a model's function takes angles for a part of a head and leaves the rest (GPT-NeoX, Phi-3)."""
    angles = torch.randn(1, q.shape[2], q.shape[3] // 2)
    try:
        own(q, k, angles.cos(), angles.sin())
    except RuntimeError:  # shapes that do not broadcast
        return False
    return True


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' ``apply_rotary_pos_emb`` by :func:`chatalign.maths.fused.rotary`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return fused.rotary(q, cos, sin), fused.rotary(k, cos, sin)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() < _CLOSE)


_FUSED = ((_is_norm, _norm_forward), (_is_lora, _lora_forward), (_is_gated, _mlp_forward))
