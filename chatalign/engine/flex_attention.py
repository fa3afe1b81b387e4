"""FlexAttention over a segment table: one kernel for all segments, whatever the precision, softcap or window.

A query sees the keys of its own segment up to itself and those of its prefix: two integer comparisons a score, and
whole blocks of scores are skipped from a table that the host makes of the segments, without a T × T mask. A shared
prefix costs nothing more: its keys are read where they are, not gathered before each reply's own.

Shapes: T tokens, N blocks of tokens, H heads, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_log = logging.getLogger(__name__)


class Segments(Protocol):
    """What is read of a plan: each segment's length, and the index of the earlier one that is its prefix."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment, in order."""
        ...

    @property
    def prefixes(self) -> list[int | None]:
        """The prefix of each segment."""
        ...


@dataclass(frozen=True)
class TokenTable:
    """Of each token (T,) int32: its segment, its segment's prefix (−1: none), and its place in its sequence."""

    segment: Tensor
    prefix: Tensor
    place: Tensor


def token_table(plan: Segments, device: torch.device | str) -> TokenTable:
    """The tokens of a plan, on `device`."""
    lengths = torch.tensor(plan.lengths)
    numbers = torch.arange(len(plan.lengths))
    prefixes = torch.tensor([-1 if prefix is None else prefix for prefix in plan.prefixes])
    before = torch.tensor([0 if prefix is None else plan.lengths[prefix] for prefix in plan.prefixes])
    starts = lengths.cumsum(0) - lengths
    shift = (before - starts).repeat_interleave(lengths)
    columns = torch.stack(
        (
            numbers.repeat_interleave(lengths),
            prefixes.repeat_interleave(lengths),
            torch.arange(int(lengths.sum())) + shift,
        )
    )
    return TokenTable(*columns.to(device, torch.int32))


def visible(table: TokenTable, window: int | None) -> MaskMod:
    """FlexAttention's mask function: true where query `q` sees key `k`; `window` bounds how far back."""

    segment, prefix, place = table.segment, table.prefix, table.place  # tensors, as the compiler wants its closures

    def own_or_prefix(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment[q] == segment[k]) & (q >= k)
        return own | (prefix[q] == segment[k])

    if window is None:
        return own_or_prefix
    reach = window

    def within_window(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return own_or_prefix(batch, head, q, k) & (place[q] - place[k] < reach)

    return within_window


def block_table(plan: Segments, window: int | None) -> tuple[Tensor, Tensor]:
    """Which blocks of scores hold something, and which of these need no mask, both (N, N) booleans on the host.

    With a window no block is called full, and none is skipped for lying beyond it.
    """
    ends = [0, *accumulate(plan.lengths)]
    count = -(-ends[-1] // BLOCK)
    some, full = torch.zeros(2, count, count, dtype=torch.bool).unbind(0)
    for i, prefix in enumerate(plan.prefixes):
        first, last = ends[i] // BLOCK, (ends[i + 1] - 1) // BLOCK
        size = last - first + 1
        some[first : last + 1, first : last + 1] |= torch.ones(size, size, dtype=torch.bool).tril()
        inner, inner_end = -(-ends[i] // BLOCK), ends[i + 1] // BLOCK  # blocks that hold this segment alone
        whole = max(inner_end - inner, 0)
        full[inner : inner + whole, inner : inner + whole] |= torch.ones(whole, whole, dtype=torch.bool).tril(-1)
        if prefix is not None:
            start, end = ends[prefix], ends[prefix + 1]
            some[first : last + 1, start // BLOCK : (end - 1) // BLOCK + 1] = True
            full[inner : inner + whole, -(-start // BLOCK) : end // BLOCK] = True
    return some, full & (window is None)


def block_mask(plan: Segments, device: torch.device, window: int | None = None) -> BlockMask:
    """FlexAttention's block mask of a plan; made once a batch and used by all layers."""
    some, full = (blocks.to(device) for blocks in block_table(plan, window))
    total = sum(plan.lengths)
    partial_count, partial_places = _ordered(some & ~full)
    full_count, full_places = _ordered(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_places,
        full_count,
        full_places,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible(token_table(plan, device), window),
        seq_lengths=(total, total),
    )


def _ordered(blocks_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (1, 1, N) and places (1, 1, N, N) of a row's blocks, those that are there first, int32."""
    places = blocks_NN.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_NN.sum(-1, dtype=torch.int32)[None, None], places.to(torch.int32)[None, None].contiguous()


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attention of q (1, H, T, D) over k and v (1, H or fewer, T, D) under a block mask; (1, T, H, D).

    Compiled on a GPU; elsewhere PyTorch's plain version, which builds all scores and has no backward pass.
    """
    call = _compiled() if query.is_cuda else flex_attention
    output: Tensor = call(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcap(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # Uncompiled it would build T × T scores. The compiler leaves lengths open from the second batch on; told to from
    # the first (dynamic=True), it would leave a softcap open too, and then can't lower it.
    return torch.compile(flex_attention)


@lru_cache
def _softcap(cap: float) -> Callable[..., Tensor]:
    # One function per cap, not per call: the compiled kernel is guarded on its identity.
    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return capped


@lru_cache
def works(
    *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, softcap: float | None
) -> bool:
    """Whether this GPU compiles and runs the kernel at a model's head shape, forward and backward; tried once.

    A shape that doesn't fit into the GPU's shared memory, or a missing compiler, is said in a warning.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    plan = _Trial()
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            query, key, value = (
                torch.randn(1, count, 2 * BLOCK, head_dim, dtype=dtype, device=device, requires_grad=True)
                for count in (heads, kv_heads, kv_heads)
            )
            output = attend(query, key, value, block_mask(plan, device), scaling=None, softcap=softcap)
            torch.autograd.grad(output.float().square().sum(), (query, key, value))
        torch.cuda.synchronize(device)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.warning("FlexAttention can't run here (%s); attention goes segment by segment", reason)
        return False
    return True


@dataclass(frozen=True)
class _Trial:
    lengths: list[int] = field(default_factory=lambda: [BLOCK - 8, BLOCK + 8])
    prefixes: list[int | None] = field(default_factory=lambda: [None, 0])
