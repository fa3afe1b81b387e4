"""The start-up check of the flat layout: a model that would mix the documents of a row is refused, never trained.

A model runs the segment entry only where its code hands the forward pass's arguments to transformers' attention
interface, and nothing else in it (a convolution, a recurrent state) looks across tokens. Both are measured, not
assumed: on a tiny batch, each segment must give what it gives alone, and must not move when another one changes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chatalign.engine.attention import ATTENTION, Kernel, SegmentPlan, entry_name, register, segment_inputs
from chatalign.engine.last_layer import Places, narrow_last_layer
from chatalign.errors import GuardError, ModelError

_LENGTHS = (5, 7, 4, 6)  # a document, then prompt | chosen | rejected
_REMEDY = "train it with `engine: trl`, or choose another model"


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside DDP, torch.compile and PEFT wrappers."""
    inner: Any = model
    while True:
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def runs_segments(model: nn.Module) -> bool:
    """Whether the model is set to the segment entry, with whichever kernel."""
    name: str = unwrapped(model).config._attn_implementation
    return name.startswith(ATTENTION)


def enable_segments(model: nn.Module, kernel: Kernel = "auto") -> frozenset[str]:
    """Set the model to the segment entry and check it; raises ModelError for a model that can't run it.

    Raises GuardError where its layers run another attention than `kernel`, or without their sliding window. Returns
    the kernels that its layers ran in the check. Nothing is run, and none returned, where the weights are not here to
    run: on the meta device, or sharded by ZeRO-3 before training.
    """
    register()
    base = unwrapped(model)
    if not getattr(base, "_can_set_attn_implementation", lambda: False)():
        raise ModelError(f"{type(base).__name__} does not use transformers' attention interface; {_REMEDY}")
    if base.config._attn_implementation != entry_name(kernel):
        base.set_attn_implementation(entry_name(kernel))
    if any(p.is_meta or hasattr(p, "ds_id") for p in base.parameters()):
        return frozenset()
    ran = check_isolation(model, kernel)
    narrow_last_layer(base, partial(_reads_the_same, base))
    return ran


def computes_in_half(model: nn.Module) -> bool:
    """Whether the forward pass rounds to half precision: by its weights (4-bit ones too) or under autocast."""
    if any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
        return True
    return torch.is_autocast_enabled(next(model.parameters()).device.type)


def check_isolation(model: nn.Module, kernel: Kernel = "auto") -> frozenset[str]:
    """Compare a tiny flat batch with its sequences run alone; raises ModelError where a segment sees another.

    Returns the kernels of attention that ran.
    """
    base = unwrapped(model)
    ids = _tiny_ids(base)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = segment_inputs(_flat_batch(ids))
            together = _run(base, inputs)
            moved = _hidden(base, _flat_batch(_change_first_and_chosen(ids, base)))
            alone = _run_alone(base, ids)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{type(base).__name__} can't run a packed row ({reason}); {_REMEDY}") from error
    finally:
        model.train(training)
    refuse_other_attention(base, kernel, inputs["segments"])
    scale = float(together.float().std())
    half = computes_in_half(model)
    ends = torch.tensor(_LENGTHS).cumsum(0).tolist()
    kept = torch.cat((together[ends[0] : ends[1]], together[ends[2] :]))
    kept_moved = torch.cat((moved[ends[0] : ends[1]], moved[ends[2] :]))
    leak = float((kept - kept_moved).abs().max())
    gap = float((together - alone).float().abs().max())
    if not leak <= (1e-2 if half else 1e-5) * scale or not gap <= (0.25 if half else 1e-3) * scale:
        raise ModelError(
            f"{type(base).__name__} mixes the documents of a packed row (leak {leak / scale:.1e}, "
            f"gap {gap / scale:.1e} of the hidden states' spread); {_REMEDY}"
        )
    return frozenset(inputs["segments"].ran)


@torch.no_grad()
def _reads_the_same(base: Any, layer: nn.Module) -> bool:
    """Whether the hidden states of a tiny batch, at places in any order and one twice, are those of a pass for all."""
    batch = _flat_batch(_tiny_ids(base))
    places = torch.tensor([11, 2, 3, 11, 20], device=base.get_input_embeddings().weight.device)
    inputs, training = segment_inputs(batch), base.training
    base.eval()
    layer.training = True  # a dropout that it has of its own shows
    try:
        whole = _run(base, inputs)[places].float()
        named = replace(inputs["segments"], places=Places.of(places, sum(_LENGTHS)))
        narrow = _run(base, inputs | {"segments": named})[places].float()
    finally:
        base.train(training)
    close = 5e-2 if computes_in_half(base) else 1e-4
    return bool((narrow - whole).abs().max() <= close * whole.std())


def refuse_other_attention(base: Any, kernel: Kernel, plan: SegmentPlan) -> None:
    """Raise GuardError where a forward pass ran no kernel of ours, another one, or left the model's window out."""
    config = base.config
    wanted = {kernel} if kernel != "auto" else plan.ran or {"sdpa"}
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else hasattr(type(config), "sliding_window")
    window = getattr(config, "sliding_window", None) if slides else None
    if plan.ran == wanted and (window is None or window in plan.windows):
        return
    ran = "+".join(sorted(plan.ran)) or "transformers' own"
    windows = "+".join(str(one) for one in sorted(plan.windows)) or "none"
    raise GuardError(
        f"{type(base).__name__}: its layers ran the attention {ran} with the window {windows}, and not "
        f"{'+'.join(sorted(wanted))} with the window {window or 'none'}; {_REMEDY}"
    )


def _tiny_ids(base: Any) -> Tensor:
    vocab_size = int(base.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (sum(_LENGTHS),), generator=generator)


def _change_first_and_chosen(ids: Tensor, base: Any) -> Tensor:
    vocab_size = int(base.get_input_embeddings().weight.shape[0])
    document, prompt, chosen, rejected = ids.split(_LENGTHS)
    return torch.cat(((document + 1) % vocab_size, prompt, (chosen + 1) % vocab_size, rejected))


def _flat_batch(ids: Tensor) -> dict[str, Any]:
    document, prompt, chosen, rejected = _LENGTHS
    ends = torch.tensor(_LENGTHS).cumsum(0).tolist()
    positions = [*range(document), *range(prompt + chosen), *range(prompt, prompt + rejected)]
    table = [
        [0, ends[0], 0, 0],
        [ends[0], ends[1], 0, 0],
        [ends[1], ends[2], ends[0], ends[1]],
        [ends[2], ends[3], ends[0], ends[1]],
    ]
    return {
        "input_ids": ids.unsqueeze(0),
        "position_ids": torch.tensor([positions]),
        "segments": torch.tensor(table, dtype=torch.int32),
    }


def _run_alone(base: Any, ids: Tensor) -> Tensor:
    document, prompt, chosen, rejected = ids.split(_LENGTHS)
    parts = []
    for sequence, kept in (
        (document, slice(None)),
        (torch.cat((prompt, chosen)), slice(None)),
        (torch.cat((prompt, rejected)), slice(len(prompt), None)),
    ):
        parts.append(_run(base, {"input_ids": sequence.unsqueeze(0), "use_cache": False})[kept])
    return torch.cat(parts)


def _hidden(base: Any, batch: dict[str, Any]) -> Tensor:
    return _run(base, segment_inputs(batch))


def _run(base: Any, inputs: dict[str, Any]) -> Tensor:
    """Last hidden states (T, hidden) of the backbone."""
    device = base.get_input_embeddings().weight.device
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    backbone = getattr(base, base.base_model_prefix)
    return backbone(**inputs).last_hidden_state[0]
