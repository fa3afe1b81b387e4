"""Attention by segments on a CPU with its gradient written out: keeps what came and what goes, whole, and no pieces.

The kernel is the one that ``F.scaled_dot_product_attention`` runs on a CPU, in float32, a segment at a time. Autograd
would keep each segment's queries, keys, values and output in float32; here the backward pass cuts them out again. In
float32 no bit of a result changes. In half precision the backward pass takes the output as it was rounded, as
FlashAttention does on a GPU.

Shapes: T tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chatalign.maths.masked import at_least_fp32

_FORWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_SHORT = 2**14  # numbers in a segment's queries, up to which a call of its own costs more than copies
_MEAN_LENGTH = 64  # of segments: with shorter ones autograd's way is faster (measured: 1.1 to 1.4 × at 10 to 40 tokens)


class Segments(Protocol):
    """What is read of a segment plan."""

    @property
    def lengths(self) -> list[int]: ...
    @property
    def prefixes(self) -> list[int | None]: ...
    @property
    def groups(self) -> list[list[int]]: ...


def fits(query: Tensor, key: Tensor, value: Tensor, plan: Segments, dropout: float) -> bool:
    """Whether SDPA would run this kernel on q, k and v of (1, H, T, D), and a call for each segment is worth it."""
    return (
        query.device.type == "cpu"
        and not dropout
        and query.shape == key.shape == value.shape
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and torch.backends.cuda.flash_sdp_enabled()  # holds for CPUs too
        and _FORWARD is not None
        and _BACKWARD is not None
        and not any(prefix is not None for prefix in plan.prefixes)
        and query.shape[2] >= _MEAN_LENGTH * len(plan.lengths)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Segments, *, scaling: float | None) -> Tensor:
    """Attention of q, k and v, each (1, H, T, D), within `plan`'s segments; (1, T, H, D) in v's dtype."""
    output: Tensor = _BySegment.apply(query, key, value, plan, scaling)
    return output


class _BySegment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Segments, scaling: float | None) -> Tensor:
        output = _empty(value)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        queries, keys, values, outputs, sums = (_cut(x, plan) for x in (query, key, value, output, logsumexp))
        for piece in _pieces(plan, query):
            q, k, v = (_take(parts, piece) for parts in (queries, keys, values))
            out, out_sums = _FORWARD(q, k, v, is_causal=q.shape[2] > 1, scale=scaling)
            _put(outputs, piece, out)
            _put(sums, piece, out_sums)
        output = output.transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.plan, ctx.scaling = plan, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        plan: Segments = ctx.plan
        gradients = [_empty(x) for x in (query, key, value)]
        written = [_cut(x, plan) for x in gradients]
        read = [_cut(x, plan) for x in (grad.transpose(1, 2), query, key, value, output.transpose(1, 2), logsumexp)]
        for piece in _pieces(plan, query):
            inputs = [_take(parts, piece) for parts in read]
            found = _BACKWARD(*inputs, 0.0, is_causal=inputs[0].shape[2] > 1, scale=ctx.scaling)
            for parts, gradient in zip(written, found, strict=True):
                _put(parts, piece, gradient)
        dquery, dkey, dvalue = gradients
        return dquery, dkey, dvalue, None, None


def _pieces(plan: Segments, query: Tensor) -> list[list[int]]:
    """Segments that one call of the kernel computes: all equal ones where they are short, else one."""
    pieces: list[list[int]] = []
    for group in plan.groups:
        short = plan.lengths[group[0]] * query.shape[1] * query.shape[3] <= _SHORT
        pieces.extend([group] if short else ([i] for i in group))
    return pieces


def _cut(row: Tensor, plan: Segments) -> tuple[Tensor, ...]:
    return row.split(plan.lengths, dim=2)


def _take(parts: tuple[Tensor, ...], piece: list[int]) -> Tensor:
    """A piece's segments, stacked, at least in float32."""
    return at_least_fp32(parts[piece[0]] if len(piece) == 1 else torch.cat([parts[i] for i in piece]))


def _put(parts: tuple[Tensor, ...], piece: list[int], stacked: Tensor) -> None:
    for i, part in zip(piece, stacked.split(1), strict=True):
        parts[i].copy_(part)


def _empty(like: Tensor) -> Tensor:
    """(1, H, T, D) that lies in memory as (1, T, H, D): linear layers have it so."""
    _, heads, total, size = like.shape
    return like.new_empty(1, total, heads, size).transpose(1, 2)
