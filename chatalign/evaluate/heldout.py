"""Held-out rows: prompts with what is known about them, preference pairs with what they contrast, plain texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from chatalign.artifact import DataUsed
from chatalign.data.formats import format_of, normalise
from chatalign.data.rows import BadRow, Kind, Messages, Preference, Prompt, Text, Tools
from chatalign.data.sources import read_source
from chatalign.errors import DataError
from chatalign.recipe import DatasetSource, EvalSection

REFERENCE_COLUMNS = ("references", "reference", "answers", "answer", "completion", "output")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A held-out prompt. `row` is its row as the file has it, for the gold function; `references` are right replies."""

    messages: Messages
    row: dict[str, Any]
    references: list[str]
    tools: Tools | None = None
    raw: bool = False  # a plain string: can do without a chat template


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A held-out preference, and what its sides differ in, where the row says (style, correctness, both)."""

    preference: Preference
    contrast: str | None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Everything that the models are measured on."""

    questions: list[Question]
    pairs: list[Pair]
    texts: list[str]
    data: list[DataUsed]


def read_held_out(section: EvalSection) -> HeldOut:
    """Read every source that a recipe names; raises DataError naming the first bad row."""
    data: list[DataUsed] = []
    questions: list[Question] = []
    pairs: list[Pair] = []
    texts: list[str] = []
    if section.prompts:
        questions, used = read_questions(section.prompts)
        data.append(used)
    if section.pairs:
        pairs, used = read_pairs(section.pairs)
        data.append(used)
    if section.texts:
        texts, used = read_texts(section.texts)
        data.append(used)
    return HeldOut(questions=questions, pairs=pairs, texts=texts, data=data)


def read_questions(source: DatasetSource) -> tuple[list[Question], DataUsed]:
    """The prompts of a source, from rows of any format; raises DataError naming the first bad row."""

    def make(made: Any, row: dict[str, Any]) -> Question:
        assert isinstance(made, Prompt)
        return Question(messages=made.prompt, row=row, references=references(row), tools=made.tools, raw=made.raw)

    return _read(source, "prompt", make)


def read_pairs(source: DatasetSource) -> tuple[list[Pair], DataUsed]:
    """The preference pairs of a source; raises DataError naming the first bad row."""

    def make(made: Any, row: dict[str, Any]) -> Pair:
        assert isinstance(made, Preference)
        contrast = row.get("contrast")
        return Pair(preference=made, contrast=str(contrast) if contrast is not None else None)

    return _read(source, "preference", make)


def read_texts(source: DatasetSource) -> tuple[list[str], DataUsed]:
    """The documents of a source; raises DataError naming the first bad row."""

    def make(made: Any, _: dict[str, Any]) -> str:
        assert isinstance(made, Text)
        return made.text

    return _read(source, "text", make)


def references(row: dict[str, Any]) -> list[str]:
    """The right replies that a row names: a reference column, else its last assistant turn or its chosen reply."""
    for name in REFERENCE_COLUMNS:
        value = row.get(name)
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return list(value)
    for name in ("completion", "chosen", "messages", "conversations"):
        turns = row.get(name)
        if isinstance(turns, str) and turns:
            return [turns]
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1]
            if last.get("role", last.get("from")) in ("assistant", "gpt"):
                return [str(last.get("content", last.get("value")))]
    return []


def shown(messages: Sequence[dict[str, Any]]) -> str:
    """A prompt as a reader sees it: its text, with roles where there is more than the user's one turn."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def _read(
    source: DatasetSource, kind: Kind, make: Callable[[Any, dict[str, Any]], Made]
) -> tuple[list[Made], DataUsed]:
    rows = read_source(source)
    made: list[Made] = []
    format_ = None
    for where, row in rows:
        try:
            format_ = format_ or format_of(source, row, kind, place=where)
            made.append(make(normalise(row, source, format_, kind), row))
        except BadRow as bad:
            raise DataError(f"{where}: {bad}") from None
    used = DataUsed(path=source.path, sha256=rows.sha256, format=format_ or kind, rows=len(rows), used=len(made))
    return made, used
