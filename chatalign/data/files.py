"""Data files, row by row: a first pass counts the rows and finds the broken ones, later passes give the good ones.

Nothing of a file stays in memory but the rows at hand, so memory doesn't grow with it. Where a row is a line, later
passes can give the lines as they are, for worker processes to parse.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from chatalign.data.json_files import Numbered, as_row, json_reader
from chatalign.data.json_values import JsonReader
from chatalign.data.opening import foreign_bytes, open_text
from chatalign.data.rows import Broken, BrokenRow
from chatalign.data.tables import csv_rows, parquet_broken, parquet_count, parquet_rows
from chatalign.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".txt")
UNCOUNTED = sys.maxsize
_CHUNK_BYTES = 16 << 20  # of lines that go to a worker together
_MARK = "\ufeff"  # a byte order mark
_A_LIST = Broken("holds a list, not an object", mend="write one object a line, or name a file of one list .json")


@dataclass(frozen=True)
class Chunk:
    """Some rows in order, or the lines that `parse` makes rows of. Iterating gives the good ones as (file:row, row)."""

    name: str
    numbered: Iterable[tuple[int, Any]]
    parse: Callable[[Iterable[tuple[int, bytes]]], Numbered] | None

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in self.good():
            yield f"{self.name}:{number}", row

    def good(self) -> Numbered:
        """The rows that are none of them Broken, numbered."""
        return ((number, row) for number, row in self.all() if not isinstance(row, Broken))

    def all(self) -> Numbered:
        """Every row, numbered; a Broken in the place of one that can't be read."""
        return iter(self.numbered) if self.parse is None else self.parse(self.numbered)


@dataclass(frozen=True)
class Part:
    """The rows of one file (or Dataset): how many are good, and a fresh pass over all of them as a Chunk has them."""

    name: str
    count: int
    read: Callable[[], Iterator[tuple[int, Any]]]
    parse: Callable[[Iterable[tuple[int, bytes]]], Numbered] | None = None

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(self._whole())

    def _whole(self) -> Chunk:
        return Chunk(self.name, self.read(), self.parse)

    def head(self, count: int) -> Part:
        """The first `count` good rows. They are parsed where they are read: nothing else tells which lines are good."""
        return Part(self.name, count, lambda: islice(self._whole().good(), count))

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The rows or lines, `size` at a time, and fewer where lines are long."""
        some: list[tuple[int, Any]] = []
        held = 0
        for number, row in self.read():
            some.append((number, row))
            held += len(row) if isinstance(row, bytes) else 0
            if len(some) == size or held >= _CHUNK_BYTES:
                yield Chunk(self.name, some, self.parse)
                some, held = [], 0
        if some:
            yield Chunk(self.name, some, self.parse)


def read_file(path: Path) -> tuple[Part, list[BrokenRow]]:
    """A file's good rows, and each of the others.

    Raises DataError where nothing tells the rows apart: a file of another kind, or one that breaks off.
    """
    part = uncounted(path)
    name, count = part.name, 0
    problems: list[BrokenRow] = []
    if part.count < UNCOUNTED:
        problems = [BrokenRow(f"{name}:{number}", row) for number, row in parquet_broken(path)]
        return replace(part, count=part.count - len(problems)), problems
    for number, row in Chunk(name, part.read(), part.parse).all():
        if isinstance(row, Broken):
            problems.append(BrokenRow(f"{name}:{number}", row))
        else:
            count += 1
    return replace(part, count=count), problems


def uncounted(path: Path) -> Part:
    """A file's rows without the first pass: for one look at all of them, where `count` is no more than a bound.

    Raises DataError where the file is of no known kind; reading it may do so too.
    """
    kind = _kind_of(path)
    if kind is None:
        raise DataError(f"{path}: not a data file by its name; expected {', '.join(SUFFIXES)} (json and txt also .gz)")
    if kind == ".parquet":
        return Part(str(path), parquet_count(path), partial(parquet_rows, path))
    if kind == ".csv":
        return Part(str(path), UNCOUNTED, partial(csv_rows, path))
    if kind == ".txt":
        return Part(str(path), UNCOUNTED, partial(_lines, path), _txt_rows)
    reader = json_reader(path) if kind == ".json" else None
    if reader is not None:
        return Part(str(path), UNCOUNTED, partial(reader, path))
    _refuse_list(path)
    return Part(str(path), UNCOUNTED, partial(_lines, path), _jsonl_rows)


def is_data_file(path: Path) -> bool:
    """Whether a file of this name is read."""
    return _kind_of(path) is not None


def _kind_of(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines end in \\n only: a lone carriage return and Unicode's separators are text."""
    with open_text(path) as file:
        yield from enumerate(file, start=1)


def _refuse_list(path: Path) -> None:
    """Raise DataError where a file of lines holds one JSON list over several lines: no line is a row of it."""
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), b"").strip().removeprefix(_MARK.encode())
    if first.startswith(b"[") and not first.endswith(b"]"):
        raise DataError(f"{path}:1: begins a JSON list in a file of JSON lines → name it .json")


def _texts(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, str | Broken]]:
    """Without blank lines."""
    for number, line in lines:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
        if not text.strip():
            continue
        if text.startswith(_MARK):
            mend = "take it out (joined files leave one in the middle)"
            yield number, Broken("begins with a byte order mark", mend=mend)
        else:
            yield number, foreign_bytes(text) or text


def _jsonl_rows(lines: Iterable[tuple[int, bytes]]) -> Numbered:
    reader = JsonReader()
    for number, line in _texts(lines):
        if isinstance(line, Broken):
            yield number, line
            continue
        try:
            value = reader.whole(line.rstrip("\n"))
            yield number, _A_LIST if isinstance(value, list) else as_row(value)
        except json.JSONDecodeError as error:
            mend = {"mend": "write one object a line"} if error.msg == "Extra data" else {}
            yield number, Broken("broken JSON", f"{error.msg}, column {error.colno}", **mend)


def _txt_rows(lines: Iterable[tuple[int, bytes]]) -> Numbered:
    for number, line in _texts(lines):
        yield number, line if isinstance(line, Broken) else {"text": line.rstrip("\n").rstrip("\r")}
