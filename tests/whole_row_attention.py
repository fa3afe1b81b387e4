"""Transformers' own attention over a whole flat row with a T × T mask: what ours, segment by segment, must equal."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from chatalign.engine import attention

Kernel = Callable[..., Tensor]  # of query, key, value, mask and scaling


def dense_mask(plan: attention.SegmentPlan) -> Tensor:
    """(T, T) booleans of what the plan's segments see, written down from its definition."""
    spans: list[tuple[int, int]] = []
    mask = torch.zeros(sum(plan.lengths), sum(plan.lengths), dtype=torch.bool)
    for length, prefix in zip(plan.lengths, plan.prefixes, strict=True):
        start = spans[-1][1] if spans else 0
        spans.append((start, start + length))
        mask[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
        if prefix is not None:
            mask[start : start + length, slice(*spans[prefix])] = True
    return mask[None, None]


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    layer: Any = SimpleNamespace(num_key_value_groups=1, training=False)
    hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return modeling_llama.eager_attention_forward(layer, query, key, value, hidden, scaling)[0]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    return sdpa_attention_forward(SimpleNamespace(is_causal=False), query, key, value, mask, scaling=scaling)[0]


def over_the_row(kernel: Kernel, rows_seen: list[int]) -> Callable[..., Any]:
    """What takes the place of ``attention._segment_by_segment``; `rows_seen` gets the segments of each call."""

    def attend(query: Tensor, key: Tensor, value: Tensor, plan: Any, _dropout: float, scaling: Any, _: Any) -> Tensor:
        rows_seen.append(len(plan.lengths))
        return kernel(query, key, value, dense_mask(plan), scaling)

    return attend
