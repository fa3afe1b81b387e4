"""Attention by segments on a CPU with its gradient written out: keeps what came and what goes, whole, and no pieces.

The kernel is the one that ``F.scaled_dot_product_attention`` runs on a CPU, in float32, a segment at a time. Autograd
would keep each segment's queries, keys, values and output in float32, and for one with a prefix its mask and all keys
and values that it sees; here the backward pass cuts them out again. In float32 no bit of a result changes. In half
precision the backward pass takes the output as it was rounded, as FlashAttention does on a GPU.

Shapes: T tokens, H heads, D head size.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chatalign.maths.masked import at_least_fp32

_FORWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_SHORT = 2**14  # numbers in a segment's queries, up to which a call of its own costs more than copies


class Segments(Protocol):
    """What is read of a segment plan."""

    @property
    def lengths(self) -> list[int]: ...
    @property
    def prefixes(self) -> list[int | None]: ...
    @property
    def groups(self) -> list[list[int]]: ...


def fits(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether SDPA would run this kernel on q, k and v of (1, H, T, D)."""
    return (
        query.device.type == "cpu"
        and not dropout
        and query.shape == key.shape == value.shape
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and torch.backends.cuda.flash_sdp_enabled()  # holds for CPUs too
        and _FORWARD is not None
        and _BACKWARD is not None
    )


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Segments, *, scaling: float | None) -> Tensor:
    """Attention of q, k and v, each (1, H, T, D), within `plan`'s segments; (1, T, H, D) in v's dtype."""
    output: Tensor = _BySegment.apply(query, key, value, plan, scaling)
    return output


class _BySegment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Segments, scaling: float | None) -> Tensor:
        output, logsumexp = _empty(value, value.dtype), query.new_empty(query.shape[:3], dtype=_wide(query))
        queries, keys, values, outputs, sums = (_Row(x, plan) for x in (query, key, value, output, logsumexp))
        for piece in _pieces(plan, query):
            q, k, v = queries.own(piece), keys.seen(piece), values.seen(piece)
            for row, part in zip((outputs, sums), _FORWARD(q, k, v, **_masking(q, k), scale=scaling), strict=True):
                row.write(piece, part)
        output = output.transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.plan, ctx.scaling = plan, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        plan: Segments = ctx.plan
        shared = any(prefix is not None for prefix in plan.prefixes)  # then gradients are sums, in float32
        dquery = _empty(query, query.dtype)
        dkey, dvalue = (_empty(x, _wide(x) if shared else x.dtype) for x in (key, value))
        queries, keys, values, sums = (_Row(x, plan) for x in (query, key, value, logsumexp))
        grads, outputs = (_Row(x.transpose(1, 2), plan) for x in (grad, output))
        dqueries, dkeys, dvalues = (_Row(x, plan) for x in (dquery, dkey, dvalue))
        for piece in reversed(_pieces(plan, query)):  # autograd's order of additions
            q, k, v = queries.own(piece), keys.seen(piece), values.seen(piece)
            out, out_sums = outputs.own(piece), sums.own(piece)
            dq, dk, dv = _BACKWARD(grads.own(piece), q, k, v, out, out_sums, 0.0, **_masking(q, k), scale=ctx.scaling)
            dqueries.write(piece, dq)
            dkeys.add(piece, dk)
            dvalues.add(piece, dv)
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype), None, None


def _pieces(plan: Segments, query: Tensor) -> list[list[int]]:
    """Segments that one call of the kernel computes: all equal ones where they are short, else one."""
    pieces: list[list[int]] = []
    for group in plan.groups:
        short = plan.lengths[group[0]] * query.shape[1] * query.shape[3] <= _SHORT
        pieces.extend([group] if short else ([i] for i in group))
    return pieces


class _Row:
    """(1, H, T, …), cut into the segments of a plan."""

    def __init__(self, row: Tensor, plan: Segments) -> None:
        self.row = row
        self.parts = row.split(plan.lengths, dim=2)
        self.ends = [*accumulate(plan.lengths)]
        self.prefixes = plan.prefixes
        self.written: set[int] = set()

    def own(self, piece: list[int]) -> Tensor:
        """A piece's segments, stacked, at least in float32."""
        return _stack([self.parts[i] for i in piece])

    def seen(self, piece: list[int]) -> Tensor:
        """The same, each after its prefix."""
        return _stack([self._with_prefix(i) for i in piece])

    def _with_prefix(self, i: int) -> Tensor:
        prefix = self.prefixes[i]
        if prefix is None:
            return self.parts[i]
        if prefix == i - 1:  # one piece of the row
            start = self.ends[prefix] - self.parts[prefix].shape[2]
            return self.row.narrow(2, start, self.ends[i] - start)
        return torch.cat((self.parts[prefix], self.parts[i]), dim=2)

    def write(self, piece: list[int], stacked: Tensor) -> None:
        for i, part in zip(piece, stacked.split(1), strict=True):
            self.parts[i].copy_(part)

    def add(self, piece: list[int], stacked: Tensor) -> None:
        """Add gradients of what a piece saw to what is `written`, the last segment's first."""
        for i, part in zip(reversed(piece), reversed(stacked.split(1)), strict=True):
            prefix = self.prefixes[i]
            if prefix is None:
                self._add(i, part)
            else:
                of_prefix, own = part.split((self.parts[prefix].shape[2], self.parts[i].shape[2]), dim=2)
                self._add(prefix, of_prefix)
                self._add(i, own)

    def _add(self, i: int, part: Tensor) -> None:
        if i in self.written:
            self.parts[i].add_(part)
        else:
            self.parts[i].copy_(part)
            self.written.add(i)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, H, T, D) that lies in memory as (1, T, H, D): linear layers have it so."""
    _, heads, total, size = like.shape
    return like.new_empty(1, total, heads, size, dtype=dtype).transpose(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _stack(parts: list[Tensor]) -> Tensor:
    return at_least_fp32(parts[0] if len(parts) == 1 else torch.cat(parts))


def _masking(query: Tensor, key: Tensor) -> dict[str, Any]:
    """The kernel's arguments for who is seen: the prefix fully, then causal."""
    length, prefix = query.shape[2], key.shape[2] - query.shape[2]
    if not prefix:
        return {"is_causal": length > 1}
    bias = torch.full((length, prefix + length), -torch.inf, dtype=query.dtype)
    return {"is_causal": False, "attn_mask": bias.triu_(prefix + 1)}
