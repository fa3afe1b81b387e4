"""PyTorch's own FlashAttention over a segment table: one call for all segments, in half precision on a GPU.

Shapes: T tokens, S segments, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from chatalign.engine.flex_attention import Segments


@dataclass(frozen=True)
class VarlenTable:
    """Cumulative lengths of queries and keys, int32 (S + 1,), and where each key comes from (None: in place)."""

    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    key_index: Tensor | None


def fits(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Whether the kernel can run it: half precision on a GPU since Ampere, heads of 8, 16 … 256, no dropout."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    head = query.shape[-1]
    return (
        query.is_cuda
        and half
        and dropout == 0
        and head == key.shape[-1] <= 256
        and not head % 8
        and _has_flash(query.device)
    )


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_table(plan: Segments, device: torch.device) -> VarlenTable:
    """A plan's table on `device`."""
    ends = [0]
    for length in plan.lengths:
        ends.append(ends[-1] + length)
    key_lengths, places = [], []
    for i, (length, prefix) in enumerate(zip(plan.lengths, plan.prefixes, strict=True)):
        before = [] if prefix is None else [torch.arange(ends[prefix], ends[prefix + 1])]
        places += [*before, torch.arange(ends[i], ends[i + 1])]
        key_lengths.append(length + (0 if prefix is None else plan.lengths[prefix]))
    key_ends = [0, *torch.tensor(key_lengths).cumsum(0).tolist()]
    shared = any(prefix is not None for prefix in plan.prefixes)
    return VarlenTable(
        cu_seq_q=torch.tensor(ends, dtype=torch.int32, device=device),
        cu_seq_k=torch.tensor(key_ends, dtype=torch.int32, device=device),
        max_q=max(plan.lengths),
        max_k=max(key_lengths),
        key_index=torch.cat(places).to(device) if shared else None,
    )


def attend(query: Tensor, key: Tensor, value: Tensor, table: VarlenTable, *, scaling: float | None) -> Tensor:
    """Attention of q (1, H, T, D) over k and v (1, H or fewer, T, D); keys of a shared prefix are gathered.

    Flash attention aligns its causal mask to the bottom right, which is "the prefix fully, then causal".
    Returns (1, T, H, D).
    """
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    if table.key_index is not None:
        keys, values = keys.index_select(0, table.key_index), values.index_select(0, table.key_index)
    grouped: dict[str, Any] = {}
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in signature(varlen_attn).parameters:  # not in every PyTorch that has varlen_attn
            grouped["enable_gqa"] = True
        else:
            keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    output = varlen_attn(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        table.cu_seq_q,
        table.cu_seq_k,
        table.max_q,
        table.max_k,
        scale=scaling,
        window_size=(-1, 0),
        **grouped,
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)
