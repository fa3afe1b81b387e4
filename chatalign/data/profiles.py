"""What tells rows apart, as hashes: worker processes make them of each row, and :mod:`cleaning` compares them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from chatalign.data.encode import RowEncoder
from chatalign.data.languages import other_language
from chatalign.data.mixing import prompt_hash
from chatalign.data.near_duplicates import NGRAM, band_hashes
from chatalign.data.ngrams import NO_HASHES, Hashes, Ragged, ngrams, words, words_and_marks
from chatalign.data.rows import BadRow, Conversation, Message, Preference, Prompt, Row, Text
from chatalign.data.workers import Task, rows_of
from chatalign.recipe import CleanSection


def parts_of(row: Row) -> list[str]:
    """The text of a row without system turns: what is asked, then each reply; of documents and prompts one part."""
    if isinstance(row, Text):
        return [row.text]
    if isinstance(row, Prompt):
        return [_text(row.prompt)]
    if isinstance(row, Conversation):
        replies = [turn for turn in row.messages if turn["role"] == "assistant"]
        return [_text([turn for turn in row.messages if turn["role"] != "assistant"]), _text(replies)]
    if isinstance(row, Preference):
        return [_text(row.prompt), _text(row.chosen), _text(row.rejected)]
    return [_text(row.prompt), _text(row.completion)]


def _text(messages: Sequence[Message]) -> str:
    pieces: list[str] = []
    for turn in messages:
        if turn["role"] != "system":
            pieces.append(turn["content"])
            pieces += [json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join(pieces)


def content_digest(row: Row) -> bytes:
    """16 bytes that rows share which are the same in all turns, labels and tools; case and white space don't count."""
    names = ("text", "messages", "prompt", "chosen", "rejected", "completion", "label", "tools")
    content = {name: _normal(getattr(row, name)) for name in names if hasattr(row, name)}
    return blake2b(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _normal(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {name: _normal(inner) for name, inner in value.items()}
    return [_normal(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Profiles:
    """What tells a chunk's good rows from others; an item a row in each field that `clean` asks for."""

    name: str
    numbers: list[int]  # as in file:row
    prompts: list[str]  # hashes of what they ask
    reasons: list[str]  # why a filter leaves them out, or nothing
    digests: bytes
    ngrams: Ragged  # for decontamination
    shingles: list[Ragged]  # for near-duplicates, a part each
    bands: Hashes


def profile_task(encoder: RowEncoder, task: Task, *, held_out: bool = False) -> Profiles:
    """Look at a chunk's rows; of rows that are `held_out`, at what they ask and their n-grams only."""
    clean = encoder.section.clean
    assert clean is not None
    rows = [(where, row) for where, row in rows_of(encoder, task) if not isinstance(row, BadRow)]
    parts = [parts_of(row) for _, row in rows]
    shared = [row_ngrams(texts, clean.decontaminate) for texts in parts] if clean.decontaminate else []
    shingled = [] if held_out or clean.near_duplicates is None else parts
    shingles = [[ngrams(words_and_marks(text), NGRAM) for text in column] for column in zip(*shingled, strict=True)]
    return Profiles(
        name=task.chunk.name,
        numbers=[int(where.rpartition(":")[2]) for where, _ in rows],
        prompts=[prompt_hash(row) if task.hashed else "" for _, row in rows],
        reasons=[] if held_out else [_filtered(row, texts, clean) for (_, row), texts in zip(rows, parts, strict=True)],
        digests=b"" if held_out or not clean.exact_duplicates else b"".join(content_digest(row) for _, row in rows),
        ngrams=Ragged.of(shared),
        shingles=[Ragged.of(column) for column in shingles],
        bands=band_hashes(map(_of_all_parts, zip(*shingles, strict=True)), clean.near_duplicates)
        if shingles and clean.near_duplicates
        else NO_HASHES,
    )


def row_ngrams(texts: Sequence[str], n: int) -> Hashes:
    """The n-grams of each part; where no part has n words, one n-gram: all words of the row."""
    in_parts = [words(text) for text in texts]
    long = [ngrams(part, n) for part in in_parts if len(part) >= n]
    if long:
        return np.concatenate(long)
    whole = [word for part in in_parts for word in part]
    return ngrams(whole, max(1, len(whole)))


def _of_all_parts(shingles: Sequence[Hashes]) -> Hashes:
    """One set for MinHash, in which the same n-gram in a prompt and in a reply are two."""
    return np.concatenate([part + np.uint64(number << 32) for number, part in enumerate(shingles)])


def _filtered(row: Row, texts: Sequence[str], clean: CleanSection) -> str:
    """Why a row is too short, too long or in another language; nothing where it isn't."""
    turns = 0
    for name in ("messages", "prompt"):
        turns += sum(turn["role"] != "system" for turn in getattr(row, name, ()))
    turns += not isinstance(row, Conversation | Prompt)  # the reply, or replies to choose from
    if turns < (clean.min_turns or 0):
        return f"fewer than {clean.min_turns} turns"
    if turns > (clean.max_turns or turns):
        return f"more than {clean.max_turns} turns"
    if clean.min_words or clean.max_words:
        count = sum(len(words(text)) for text in texts)
        if count < (clean.min_words or 0):
            return f"fewer than {clean.min_words} words"
        if count > (clean.max_words or count):
            return f"more than {clean.max_words} words"
    language = other_language("\n".join(texts), clean.languages) if clean.languages else None
    return f"in another language ({language})" if language else ""
