"""Which rows share a flat batch: best-fit-decreasing bins, and batches under a token budget.

A bin is a list of row indices whose lengths sum to at most the capacity. Both functions are deterministic: the
same lengths give the same bins on every rank.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack rows of `lengths` tokens into bins of at most `capacity` tokens; returns row indices by bin.

    Longest rows first, each into the fullest bin that still takes it; rows of one length keep their order. The bins
    that have r tokens free are kept in stacks by r, and a sorted list says which stacks hold a bin, so that the best
    fit is one bisection: O(n log n) for the sort, and for each row a shift of that list, at most capacity long.
    Never more than 11/9 of the fewest bins possible, plus 1 (Johnson, 1973).
    Raises ValueError where a row is empty or longer than `capacity`.
    """
    if not len(lengths):
        return []
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.min() < 1 or sizes.max() > capacity:
        row = int(sizes.argmin() if sizes.min() < 1 else sizes.argmax())
        raise ValueError(f"row {row} has {sizes[row]} tokens; a bin takes rows of 1 to {capacity}")
    order = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by tokens free
    free_sizes: list[int] = []  # of the stacks that hold a bin, ascending
    for row, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(free_sizes, size)
        if at < len(free_sizes):
            free = free_sizes[at]
            stack = open_bins[free]
            index = stack.pop()
            if not stack:
                del free_sizes[at]
            bins[index].append(row)
        else:
            free, index = capacity, len(bins)
            bins.append([row])
        left = free - size
        if left:
            if not open_bins[left]:
                insort(free_sizes, left)
            open_bins[left].append(index)
    return bins


def token_budget_batches(
    lengths: Sequence[int], max_tokens: int, *, max_rows: int | None = None, order: Sequence[int] | None = None
) -> list[list[int]]:
    """Consecutive rows in batches of at most `max_tokens` tokens, and at most `max_rows` rows where given.

    `order` is the order to take rows in (default: as they are; a seeded permutation shuffles). A row longer than
    the budget gets a batch to itself. Every row is in exactly one batch.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    tokens = 0
    for row in range(len(lengths)) if order is None else order:
        full = max_rows is not None and len(current) >= max_rows
        if current and (full or tokens + lengths[row] > max_tokens):
            batches.append(current)
            current, tokens = [], 0
        current.append(row)
        tokens += lengths[row]
    if current:
        batches.append(current)
    return batches


def fill_rate(lengths: Sequence[int], bins: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the bins' places that hold a token, 0 to 1."""
    return sum(lengths[row] for bin_ in bins for row in bin_) / (capacity * len(bins)) if bins else 0.0
