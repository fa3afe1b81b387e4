"""Rows of a data section as the model sees them, with what the whole table adds up to: what is shown in either form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray

from chatalign.artifact import DataUsed
from chatalign.data.chat import chat_encoder
from chatalign.data.preparation import Prepared
from chatalign.data.rows import Kind
from chatalign.errors import RecipeError
from chatalign.preview.roles import OTHER, RoleMarkers
from chatalign.preview.statistics import Statistics, roles_of, statistics
from chatalign.preview.tokens import Piece, TokenTexts
from chatalign.recipe import DataSection

Split = Literal["train", "eval"]
_HEADINGS = {
    "input_ids": "",
    "prompt_ids": "prompt",
    "chosen_ids": "chosen",
    "rejected_ids": "rejected",
    "completion_ids": "completion",
}
_LABELS = {True: "thumb up", False: "thumb down"}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One column of a row: ``""`` (a document), ``prompt``, ``chosen`` … `tokens` counts what isn't shown too."""

    label: str
    pieces: list[Piece]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A row by its number (from 1), where it stands in its file, and what it lost: `whole` tokens became `tokens`."""

    number: int
    place: str
    tokens: int
    whole: int
    sides: list[Side]
    label: str  # thumb up or down, of unpaired rows
    cut: str  # what was cut, in words; empty where nothing was


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What ``chatalign inspect`` shows."""

    title: str
    split: Split
    kind: Kind
    total: int
    rows: list[ShownRow]
    statistics: Statistics
    used: list[DataUsed]
    others: int  # rows of the other split


def preview(
    prepared: Prepared,
    section: DataSection,
    tokenizer: Any,
    kind: Kind,
    *,
    title: str = "",
    split: Split = "train",
    count: int = 3,
    row: int | None = None,
    most_tokens: int | None = None,
    batch_size: int = 8,
    pads: bool = False,
) -> Preview:
    """The first `count` rows of a split, or only number `row` (from 1), and the split's statistics.

    `most_tokens` bounds what is decoded of all rows together; `batch_size` and `pads` are the trainer's. Raises
    RecipeError where the split or the row isn't there.
    """
    table, origin = _split(prepared, split)
    numbers = _numbers(len(table), count, row)
    templated = section.apply_chat_template and bool(tokenizer.chat_template) and kind != "text"
    markers = RoleMarkers(tokenizer, chat_encoder(tokenizer) if templated else None)
    reader = _Reader(TokenTexts(tokenizer), markers, section, kind, most_tokens)
    shown = []
    for number in numbers:
        if reader.left is not None and reader.left <= 0:
            break
        shown.append(reader.row(number, table[number - 1], origin[number - 1]))
    return Preview(
        title=title,
        split=split,
        kind=kind,
        total=len(table),
        rows=shown,
        statistics=statistics(table, origin, markers, section, kind, batch_size=batch_size, pads=pads),
        used=prepared.used,
        others=len(prepared.train) if split == "eval" else 0 if prepared.eval is None else len(prepared.eval),
    )


def _split(prepared: Prepared, split: Split) -> tuple[datasets.Dataset, datasets.Dataset]:
    if split == "train":
        assert prepared.train_origin is not None
        return prepared.train, prepared.train_origin
    if prepared.eval is None or prepared.eval_origin is None:
        raise RecipeError("there are no rows to evaluate on; set `data.eval_fraction` or `data.eval_datasets`")
    return prepared.eval, prepared.eval_origin


def _numbers(total: int, count: int, row: int | None) -> Sequence[int]:
    if row is None:
        return range(1, min(count, total) + 1)
    if not 1 <= row <= total:
        raise RecipeError(f"there is no row {row}; give a number from 1 to {total}")
    return [row]


@dataclass
class _Reader:
    """Makes shown rows, until `left` tokens are used up (None: without end)."""

    texts: TokenTexts
    markers: RoleMarkers
    section: DataSection
    kind: Kind
    left: int | None

    def row(self, number: int, columns: dict[str, Any], origin: dict[str, Any]) -> ShownRow:
        """One row by its columns."""
        names = [name for name in _HEADINGS if name in columns]
        sides = [self._side(name, columns) for name in names]
        tokens, whole = sides[0].tokens + max((side.tokens for side in sides[1:]), default=0), origin["full_length"]
        return ShownRow(
            number=number,
            place=origin["place"],
            tokens=tokens,
            whole=whole,
            sides=sides,
            label=_LABELS[columns["label"]] if "label" in columns else "",
            cut=f"cut from {whole:,} to {tokens:,} tokens, {self._where(names, columns)}" if whole > tokens else "",
        )

    def _where(self, names: Sequence[str], columns: dict[str, Any]) -> str:
        """Where a row was cut: a whole reply ends in a special token."""
        if names == ["input_ids"]:
            return "at its end"
        replies_cut = any(columns[name][-1] not in self.texts.special_ids for name in names[1:])
        start_cut = not replies_cut or bool(self._roles("prompt_ids", columns)[0] == OTHER)
        places = ["the prompt's start"] * start_cut + ["a reply's end"] * replies_cut
        return f"at {' and '.join(places)}"

    def _roles(self, name: str, columns: dict[str, Any]) -> NDArray[np.int8]:
        return roles_of(
            np.asarray(columns[name], dtype=np.int32),
            np.zeros(1, dtype=np.int64),
            np.asarray(_targets(name, columns), dtype=np.int8),
            self.markers,
            kind=self.kind,
            column=name,
            supervise=self.section.supervise,
        )

    def _side(self, name: str, columns: dict[str, Any]) -> Side:
        ids: list[int] = columns[name]
        upto = len(ids) if self.left is None else min(self.left, len(ids))
        if self.left is not None:
            self.left -= upto
        roles = self._roles(name, columns).tolist()
        pieces = self.texts.pieces(ids[:upto], _targets(name, columns)[:upto], roles[:upto])
        return Side(label=_HEADINGS[name], pieces=pieces, tokens=len(ids))


def _targets(name: str, columns: dict[str, Any]) -> list[int]:
    given: list[int] | None = columns.get("supervised")
    return [int(name != "prompt_ids")] * len(columns[name]) if given is None else given
