"""Attention over the flat layout: each segment sees itself causally and its prefix fully, and nothing else.

A batch is one row of T tokens with a segment table [S, 4] of (start, end, prefix_start, prefix_end). Documents are
segments without a prefix; a preference pair is prompt | chosen | rejected, both replies having the prompt as their
prefix. The entry is registered with transformers' attention interface, so that models run it unchanged, and no
T × T mask is ever built. Without segments it is transformers' own SDPA, so ``generate`` works as before.

Shapes: T tokens, S segments, H heads, D head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chatalign.engine import cpu_attention, flex_attention, varlen_attention
from chatalign.engine.last_layer import Places, places_read
from chatalign.errors import ModelError
from chatalign.maths.masked import at_least_fp32

Kernel = Literal["auto", "varlen", "flex", "sdpa"]
ATTENTION = "chatalign_segments"  # the entry's name; one that holds to a kernel has it appended
# Arguments of other attention entries that change the result and that this one does not compute.
_UNSUPPORTED = ("s_aux", "position_bias")


@dataclass(frozen=True)
class SegmentPlan:
    """A segment table read once for all layers. Built on the host: kernels take lengths as plain numbers."""

    lengths: list[int]
    prefixes: list[int | None]  # which earlier segment each one has as its prefix
    longest: int  # keys that the longest segment sees, its prefix included
    groups: list[list[int]]  # segments of equal length and equal prefix length, run as one batch
    places: Places | None = None  # at which alone the last layer's output is read
    _masks: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, compare=False)
    _varlen: dict[torch.device, varlen_attention.VarlenTable] = field(default_factory=dict, compare=False)
    _flex: dict[tuple[torch.device, int | None], Any] = field(default_factory=dict, compare=False)
    ran: set[str] = field(default_factory=set, compare=False)  # kernels that were used on it
    windows: set[int] = field(default_factory=set, compare=False)  # that layers asked for

    def mask(self, length: int, prefix: int, device: torch.device) -> Tensor:
        """(length, prefix + length) booleans: the prefix fully, then causal."""
        key = (length, prefix, device)
        if key not in self._masks:
            everything = torch.ones(length, prefix + length, dtype=torch.bool, device=device)
            self._masks[key] = everything.tril(diagonal=prefix)
        return self._masks[key]

    def varlen(self, device: torch.device) -> varlen_attention.VarlenTable:
        """The same table for a variable-length kernel, on `device`."""
        if device not in self._varlen:
            self._varlen[device] = varlen_attention.varlen_table(self, device)
        return self._varlen[device]

    def flex(self, device: torch.device, window: int | None) -> Any:
        """The same table as FlexAttention's block mask."""
        window = window if window is not None and self.longest > window else None
        if (device, window) not in self._flex:
            self._flex[device, window] = flex_attention.block_mask(self, device, window)
        return self._flex[device, window]


def plan_segments(segments: Tensor, total: int) -> SegmentPlan:
    """Read a segment table of a row of `total` tokens.

    Raises ValueError where segments do not tile the row in order, or a prefix is not one earlier segment.
    """
    rows: list[tuple[int, int, int, int]] = [tuple(row) for row in segments.tolist()]
    starts = {(start, end): i for i, (start, end, _, _) in enumerate(rows)}
    lengths, prefixes, place = [], [], 0
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (start, end, prefix_start, prefix_end) in enumerate(rows):
        prefix = starts.get((prefix_start, prefix_end)) if prefix_end > prefix_start else None
        if start != place or end <= start or (prefix_end > prefix_start and (prefix is None or prefix >= i)):
            raise ValueError(
                f"segment {i} is {rows[i]}; segments must tile the row in order and have one earlier segment as prefix"
            )
        lengths.append(end - start)
        prefixes.append(prefix)
        groups[(end - start, prefix_end - prefix_start)].append(i)
        place = end
    if place != total:
        raise ValueError(f"segments cover {place} tokens of {total}")
    longest = max(length + prefix for length, prefix in groups)
    return SegmentPlan(lengths=lengths, prefixes=prefixes, longest=longest, groups=list(groups.values()))


def segment_inputs(batch: dict[str, Any], places: Tensor | None = None) -> dict[str, Any]:
    """A flat batch's arguments for a model's forward pass: ids, positions and the plan of its segments.

    With `places` (K,) the last hidden states are right at those places, and may be anything at others. The one-element
    4-D mask keeps transformers from building its T × T mask; the entry never reads it. The plan is a plain object, so
    that DDP does not carry it to the accelerator and back.
    """
    ids = batch["input_ids"]
    plan = plan_segments(batch["segments"], ids.shape[1])
    return {
        "input_ids": ids,
        "position_ids": batch["position_ids"],
        "segments": plan if places is None else replace(plan, places=places_read(places, ids.shape[1])),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        "use_cache": False,
    }


def segment_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: SegmentPlan | Tensor | None = None,
    kernel: Kernel = "auto",
    **kwargs: Any,  # transformers' interface: what a model passes to every attention entry
) -> tuple[Tensor, None]:
    """Attention of q (1, H, T, D) over k and v (1, H or fewer, T, D); returns ((1, T, H, D), None).

    Raises ModelError where a segment is longer than the layer's sliding window (FlexAttention computes windows), the
    model needs a term that is not computed here, or `kernel` can't run what the layer asks for.
    """
    softcap = kwargs.get("softcap")
    if segments is None and softcap is not None:
        key, value = _repeat_heads(query, key, value)
        mask = _causal_mask(query, key) if attention_mask is None else attention_mask
        return _softcapped(query, key, value, mask, dropout, scaling, softcap).transpose(1, 2), None
    if segments is None:
        output, weights = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, weights
    plan = segments if isinstance(segments, SegmentPlan) else plan_segments(segments, query.shape[2])
    if query.device.type != "cpu" or kernel in ("varlen", "flex"):  # SDPA on a CPU runs in float32, see below
        query, key, value = _in_autocast_dtype(query, key, value)
    kernel = _choose(kernel, query, key, dropout, softcap)
    plan.ran.add(kernel)
    if (window := kwargs.get("sliding_window")) is not None:
        plan.windows.add(window)
    _require_supported(module, plan, kwargs, windows=kernel == "flex")
    if kernel == "varlen":
        return varlen_attention.attend(query, key, value, plan.varlen(query.device), scaling=scaling), None
    if kernel == "flex":
        mask = plan.flex(query.device, kwargs.get("sliding_window"))
        return flex_attention.attend(query, key, value, mask, scaling=scaling, softcap=softcap), None
    key, value = _repeat_heads(query, key, value)
    return _segment_by_segment(query, key, value, plan, dropout, scaling, softcap), None


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    # Rotary embedding multiplies by float32 cosines, so that under autocast queries and keys arrive in float32.
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _choose(wanted: Kernel, query: Tensor, key: Tensor, dropout: float, softcap: float | None) -> Kernel:
    """The kernel that runs; ModelError where a wanted one can't."""
    if wanted == "sdpa" or (wanted == "auto" and not query.is_cuda):
        return "sdpa"
    varlen = softcap is None and varlen_attention.fits(query, key, dropout)
    if wanted == "varlen" and not varlen:
        raise ModelError(
            "`model.attention: varlen` runs on a GPU since Ampere, in half precision, with heads of 8 to 256, without "
            "dropout and softcap, and this layer asks for something else; set `model.attention: auto`"
        )
    if wanted == "flex" and dropout:
        raise ModelError("`model.attention: flex` has no dropout; set `model.attention: auto`")
    if wanted != "auto":
        return wanted
    if varlen:
        return "varlen"
    shape = {"heads": query.shape[1], "kv_heads": key.shape[1], "head_dim": query.shape[-1]}
    fits = not dropout and flex_attention.works(**shape, dtype=query.dtype, device=query.device, softcap=softcap)
    return "flex" if fits else "sdpa"


def _require_supported(module: nn.Module, plan: SegmentPlan, kwargs: dict[str, Any], *, windows: bool) -> None:
    window = kwargs.get("sliding_window")
    if window is not None and plan.longest > window and not windows:
        raise ModelError(
            f"a sequence of {plan.longest} tokens is longer than {type(module).__name__}'s sliding window of {window}; "
            f"set `data.max_length` to {window} or less"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} needs `{name}` in its attention, which the native engine does not compute; "
                "train it with `engine: trl`"
            )


def _segment_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """SDPA on each group of equal segments; (1, T, H, D)."""
    if query.device.type != "cpu":
        return _grouped(query, key, value, plan, dropout, scaling, softcap)
    if softcap is None and cpu_attention.fits(query, key, value, plan, dropout):
        return cpu_attention.attend(query, key, value, plan, scaling=scaling)
    # bf16 would save nothing: SDPA's backward pass takes 3 × as long in it (measured, with AMX).
    dtype = value.dtype
    query, key, value = (at_least_fp32(x) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        return _grouped(query, key, value, plan, dropout, scaling, softcap).to(dtype)


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    # split, not slicing: the backward pass of a split is one concatenation, that of S slices is S full-size buffers.
    queries = torch.split(query, plan.lengths, dim=2)
    keys = torch.split(key, plan.lengths, dim=2)
    values = torch.split(value, plan.lengths, dim=2)
    outputs: list[Tensor] = [query] * len(plan.lengths)
    for group in plan.groups:
        group_output = _attend(
            _stack([queries[i] for i in group]),
            _stack([_with_prefix(keys, i, plan.prefixes[i]) for i in group]),
            _stack([_with_prefix(values, i, plan.prefixes[i]) for i in group]),
            plan,
            dropout,
            scaling,
            softcap,
        ).transpose(1, 2)
        for i, output in zip(group, torch.split(group_output, 1), strict=True):
            outputs[i] = output
    return torch.cat(outputs, dim=1)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _with_prefix(parts: Sequence[Tensor], i: int, prefix: int | None) -> Tensor:
    return parts[i] if prefix is None else torch.cat((parts[prefix], parts[i]), dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    length, prefix = query.shape[2], key.shape[2] - query.shape[2]
    if softcap is None:
        mask = plan.mask(length, prefix, query.device) if prefix else None
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and length > 1, scale=scaling
        )
    return _softcapped(query, key, value, plan.mask(length, prefix, query.device), dropout, scaling, softcap)


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    return repeat_kv(key, repeats), repeat_kv(value, repeats)


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    everything = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return everything.tril(diagonal=key.shape[2] - query.shape[2])


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention with s · tanh(x / s) on its scores (Gemma 2), which SDPA lacks; `mask` is true where a key is seen."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p=dropout, training=dropout > 0) @ value


def entry_name(kernel: Kernel) -> str:
    """The name under which transformers knows the entry that runs `kernel`."""
    return ATTENTION if kernel == "auto" else f"{ATTENTION}_{kernel}"


@cache
def register(*, opaque: bool = False) -> None:
    """Make the entry known to transformers by :func:`entry_name`, one for each kernel; again does nothing.

    `opaque` keeps torch.compile out of it, for the rest of the process: segments differ from batch to batch.
    """
    forward = torch.compiler.disable(segment_attention_forward) if opaque else segment_attention_forward
    for kernel in get_args(Kernel):
        AttentionInterface.register(entry_name(kernel), partial(forward, kernel=kernel))
        AttentionMaskInterface.register(entry_name(kernel), sdpa_mask)
