"""Which rows train and which evaluate, and in what proportion sources are mixed. Seeded; the same on every rank."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Container, Sequence
from enum import IntEnum

from chatalign.data.rows import Conversation, Row, Text


def prompt_hash(row: Row) -> str:
    """sha256 of what a row asks: its turns before the first target, or a document's text.

    Case and white space don't count, so that a copy that differs in them only falls on the same side of a split.
    """
    if isinstance(row, Text):
        asked = [row.text]
    elif isinstance(row, Conversation):
        first = next((i for i, turn in enumerate(row.messages) if turn["role"] == "assistant"), len(row.messages))
        asked = [turn["content"] for turn in row.messages[: max(first, row.first_supervised)]]
    else:
        asked = [turn["content"] for turn in row.prompt]
    normal = [" ".join(text.casefold().split()) for text in asked]
    return hashlib.sha256(json.dumps(normal, ensure_ascii=False).encode()).hexdigest()


class Side(IntEnum):
    """Where a row of ``datasets`` goes; ``NEITHER``: left out, since its prompt is in ``eval_datasets``."""

    TRAIN = 0
    EVAL = 1
    NEITHER = 2


def side_of(digest: str, *, eval_fraction: float, asked: Container[str]) -> Side:
    """The side of a row by its prompt's hash; `asked` are those of ``eval_datasets``. Without a hash, TRAIN."""
    if digest and is_eval(digest, eval_fraction):
        return Side.EVAL
    return Side.NEITHER if digest in asked else Side.TRAIN


def is_eval(digest: str, eval_fraction: float) -> bool:
    """Whether the row of this prompt hash is for evaluation: a property of the content, not of a seed or an order."""
    return int(digest[:15], 16) < eval_fraction * 16**15


def mixture(sizes: Sequence[int], weights: Sequence[float | None], *, seed: int) -> list[tuple[int, int]]:
    """An epoch as (source, row) pairs.

    Without weights every row of every source once, in order. With weights an epoch is as long as all sources
    together and source i has the share weight_i / Σ weights of it: whole passes over its rows, then a seeded choice
    of the rest; sources are interleaved by a seeded shuffle. The trainer shuffles again each epoch.
    Raises ValueError where a weighted source has no rows.
    """
    if all(weight is None for weight in weights):
        return [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    shares = [float(weight or 0.0) for weight in weights]
    total, scale = sum(sizes), sum(shares)
    rng = random.Random(seed)
    drawn: list[tuple[int, int]] = []
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if size == 0:
            raise ValueError(f"source {source} has a weight and no rows")
        passes, rest = divmod(round(total * share / scale), size)
        rows = list(range(size)) * passes + sorted(rng.sample(range(size), rest))
        drawn += [(source, row) for row in rows]
    rng.shuffle(drawn)
    return drawn
