"""Data files, row by row: a first pass counts the rows and finds the broken ones, later passes give the good ones.

Nothing of a jsonl, txt, csv or parquet file, or of a json file that is one list of objects, stays in memory but the
row at hand, so memory doesn't grow with a file. Other json files are read whole. Where a row is a line, later passes
can give the lines as they are, for worker processes to parse.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from chatalign.data.rows import kind_of
from chatalign.errors import DataError

Numbered = Iterator[tuple[int, Any]]  # (the row's place in the file, from 1; the row, or a Broken in its stead)
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".txt")
_MEND = "mend or delete this row"
_CHUNK = 1 << 20
UNCOUNTED = sys.maxsize
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Broken:
    """What is wrong with a row that can't be read. `reason` is what drops are counted by, `detail` is this row's."""

    reason: str
    detail: str = ""
    mend: str = _MEND


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that can't be read, and where it stands (file:row). As text it is a finished line."""

    place: str
    broken: Broken

    def __str__(self) -> str:
        detail = f" ({self.broken.detail})" if self.broken.detail else ""
        return f"{self.place}: {self.broken.reason}{detail} → {self.broken.mend}"


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
        """The rows or lines, `size` at a time."""
        numbered = self.read()
        while some := list(islice(numbered, size)):
            yield Chunk(self.name, some, self.parse)


class _NotAList(Exception):
    """The json file isn't one list of objects, or is broken: only its whole text tells."""


def read_file(path: Path) -> tuple[Part, list[BrokenRow]]:
    """A file's good rows, and each of the others.

    Raises DataError where nothing of the file can be read.
    """
    try:
        part = uncounted(path)
        if part.count < UNCOUNTED:
            return part, []
        count = 0
        problems: list[BrokenRow] = []
        for number, row in Chunk(part.name, part.read(), part.parse).all():
            if isinstance(row, Broken):
                problems.append(BrokenRow(f"{path}:{number}", row))
            else:
                count += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {_place(path, error)}); save it as UTF-8") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: can't be read ({error}); check the file") from None
    return replace(part, count=count), problems


def uncounted(path: Path) -> Part:
    """A file's rows without the first pass: for one look at all of them, where `count` is no more than a bound.

    Raises what reading does; only :func:`read_file` tells it as a DataError.
    """
    reader = reader_of(path)
    if reader is None:
        raise DataError(f"{path}: not a data file by its name; expected {', '.join(SUFFIXES)} (json and txt also .gz)")
    if reader is _parquet:
        return Part(str(path), _parquet_rows(path), partial(_parquet, path))
    if reader is _json:
        reader = _json_reader(path)
    parse = _PARSERS.get(reader)
    return Part(str(path), UNCOUNTED, partial(reader if parse is None else _lines, path), parse)


def reader_of(path: Path) -> Callable[[Path], Numbered] | None:
    """What reads a file of this name; None where nothing does."""
    name = path.name.lower().removesuffix(".gz")
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _place(path: Path, error: UnicodeDecodeError) -> int:
    """The byte of the whole file that isn't UTF-8; `error` knows its place in one line only."""
    with _open(path) as file:
        try:
            file.read().decode("utf-8-sig")
        except UnicodeDecodeError as whole:
            return whole.start
    return error.start


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines end in \\n only: a lone carriage return and Unicode's separators are text."""
    with _open(path) as file:
        yield from enumerate(file, start=1)


def _texts(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, str]]:
    """Without blank lines."""
    for number, line in lines:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.strip():
            yield number, text


def _jsonl_rows(lines: Iterable[tuple[int, bytes]]) -> Numbered:
    for number, line in _texts(lines):
        try:
            yield number, _object(json.loads(line.rstrip("\n")))
        except json.JSONDecodeError as error:
            yield number, Broken("broken JSON", f"{error.msg}, column {error.colno}")


def _jsonl(path: Path) -> Numbered:
    return _jsonl_rows(_lines(path))


def _object(value: Any) -> dict[str, Any] | Broken:
    return value if isinstance(value, dict) else Broken(f"holds {kind_of(value)}, not an object")


def _txt_rows(lines: Iterable[tuple[int, bytes]]) -> Numbered:
    for number, line in _texts(lines):
        yield number, {"text": line.rstrip("\n").rstrip("\r")}


def _txt(path: Path) -> Numbered:
    return _txt_rows(_lines(path))


def _csv(path: Path) -> Numbered:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    good = 0
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            for number, row in enumerate(csv.DictReader(text, strict=True), start=1):
                if None in row or None in row.values():  # DictReader's marks for too many and too few fields
                    yield number, Broken("has another number of fields than the header")
                    continue
                good += 1
                yield number, {name: value if value != "" else None for name, value in row.items() if name}
        except csv.Error as error:
            raise DataError(f"{path}:{good + 1}: broken CSV ({error}) → {_MEND}") from None


def _parquet(path: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise _not_parquet(path, error) from None


def _parquet_rows(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except pyarrow.ArrowException as error:
        raise _not_parquet(path, error) from None


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); write it again")


def _json_reader(path: Path) -> Callable[[Path], Numbered]:
    """The reader for a .json file's content: a list of objects, JSON lines under another name, or the whole text."""
    try:
        for _ in _json_list(path):
            pass
    except _NotAList:
        return _json
    return _json_list


def _json_list(path: Path) -> Numbered:
    """The objects of a JSON list, one by one; raises _NotAList for everything else."""
    decode = json.JSONDecoder().raw_decode
    chunks = _text_chunks(path)
    text, at, number = "", 0, 0
    awaited = "["
    while True:
        at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            text, at = next(chunks, ""), 0
            if text:
                continue
            if awaited == "":
                return
            raise _NotAList
        if awaited == "{":
            if text[at] != "{":
                raise _NotAList
            try:
                row, at = decode(text, at)
            except json.JSONDecodeError:
                more = next(chunks, "")  # the row goes on there, or is broken
                if not more:
                    raise _NotAList from None
                text, at = text[at:] + more, 0
                continue
            number += 1
            yield number, row
            awaited = ",]"
        elif text[at] not in awaited or not awaited:
            raise _NotAList
        else:
            awaited = "" if text[at] == "]" else "{"
            at += 1


def _text_chunks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _open(path) as file:
        while chunk := file.read(_CHUNK):
            if text := decoder.decode(chunk):
                yield text
        decoder.decode(b"", final=True)


def _json(path: Path) -> Numbered:
    """A json file by its whole text."""
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":  # JSON lines under another name
            yield from _jsonl(path)
            return
        raise DataError(_broken_json(path, text, error)) from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        if len(lists) != 1:
            raise DataError(f'{path}: a JSON object without one list of rows; write a list, or {{"data": […]}}')
        value = lists[0]
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {kind_of(value)}, not a list of rows; write a list of objects")
    for number, row in enumerate(value, start=1):
        yield number, _object(row)


def _broken_json(path: Path, text: str, error: json.JSONDecodeError) -> str:
    """The row in which a JSON list breaks off, found by decoding its elements one by one."""
    decoder = json.JSONDecoder()
    at, row = text.find("[") + 1, 1
    while 0 < at < len(text):
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        row += 1
    return f"{path}:{row}: broken JSON ({error.msg}, line {error.lineno} column {error.colno}) → {_MEND}"


_READERS: dict[str, Callable[[Path], Numbered]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _txt,
}
_PARSERS: dict[Callable[[Path], Numbered], Callable[[Iterable[tuple[int, bytes]]], Numbered]] = {
    _jsonl: _jsonl_rows,
    _txt: _txt_rows,
}
