"""Rows out of .json files, one by one: a list of objects, or an object that holds one such list."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from chatalign.data.json_values import TOO_DEEP, JsonReader, printable
from chatalign.data.opening import foreign_bytes, open_text
from chatalign.data.rows import Broken, kind_of
from chatalign.errors import DataError

Numbered = Iterator[tuple[int, Any]]  # (the row's place in the file, from 1; the row, or a Broken in its stead)
_CHUNK = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_LONGEST_ESCAPE = 12  # characters: \ud83d\ude00; a value that breaks off nearer to the end may go on behind it


def as_row(value: Any) -> Any:
    """A row is an object; everything else is Broken."""
    if isinstance(value, dict | Broken):
        return value
    return Broken(f"holds {'null' if value is None else kind_of(value)}, not an object")


def json_reader(path: Path) -> Callable[[Path], Numbered] | None:
    """What reads a .json file: a list of objects, or an object with one such list; None for JSON lines.

    Raises DataError where the file holds neither.
    """
    with open_text(path) as file:
        window = _Window(path, _text_chunks(file))
        begin = window.peek()
        if begin == "[":
            return json_list
        if not begin:
            raise DataError(f"{path}: holds no rows; give a file with at least one")
        if begin != "{":
            value = window.value(JsonReader(), row=1)
            what = "no JSON" if isinstance(value, Broken) else kind_of(value)
            raise DataError(f"{path}: holds {what}, not a list of rows; write a list of objects")
        lists = {key for key, number, value in _members(window) if number == 1 and isinstance(value, dict | Broken)}
        if window.peek() == "{":
            return None
        if window.peek():
            raise window.broken("Extra data", window.at, row=1)
    if len(lists) != 1:
        raise DataError(f'{path}: a JSON object without one list of rows; write a list, or {{"data": […]}}')
    return partial(_member, lists.pop())


def json_list(path: Path) -> Numbered:
    """The elements of a JSON list, one by one. Raises DataError where it breaks off: nothing tells what follows."""
    with open_text(path) as file:
        window = _Window(path, _text_chunks(file))
        number = 0
        for number, value in _elements(window, JsonReader()):
            yield number, as_row(value)
        if window.peek():
            raise window.broken("Extra data", window.at, row=number + 1)


def _elements(window: _Window, reader: JsonReader) -> Numbered:
    """The elements of the list that begins here."""
    window.take("[", row=1)
    if window.peek() == "]":
        window.take("]", row=1)
        return
    number, ended = 0, False
    while not ended:
        number += 1
        yield number, window.value(reader, row=number)
        ended = window.take(",]", row=number) == "]"


def _members(window: _Window) -> Iterator[tuple[str, int, Any]]:
    """The members of the object that begins here: of a list each element with its place, of others the value and 0."""
    reader, number = JsonReader(), 0
    keys: set[str] = set()
    ended = window.take("{", row=1) == "{" and window.peek() == "}"
    if ended:
        window.take("}", row=1)
    while not ended:
        key = str(window.value(reader, row=1))
        if key in keys:
            raise DataError(f"{window.path}: {printable(key)}: stands twice in one object → keep one")
        keys.add(key)
        window.take(":", row=1)
        if window.peek() == "[":
            for number, value in _elements(window, reader):
                yield key, number, value
        else:
            yield key, 0, window.value(reader, row=1)
        ended = window.take(",}", row=number + 1) == "}"


def _member(key: str, path: Path) -> Numbered:
    """The elements of one list in the object that a file holds."""
    with open_text(path) as file:
        for name, number, value in _members(_Window(path, _text_chunks(file))):
            if name == key and number:
                yield number, as_row(value)


class _Window:
    """The part of a file's text that is at hand, and which line and column of the file it begins at."""

    def __init__(self, path: Path, chunks: Iterator[str]) -> None:
        self.path, self._chunks = path, chunks
        self.text, self.at = "", 0
        self._line, self._column = 1, 0

    def peek(self) -> str:
        """The next character that isn't blank; empty at the end of the file."""
        while True:
            self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def take(self, wanted: str, *, row: int) -> str:
        """The next character that isn't blank, which must be one of `wanted`."""
        found = self.peek()
        if not found or found not in wanted:
            raise self.broken(f"Expecting {' or '.join(map(repr, wanted))}", self.at, row=row)
        self.at += 1
        return found

    def value(self, reader: JsonReader, *, row: int) -> Any:
        """The value that begins here, or a Broken where one does that must not be taken."""
        self.peek()
        while True:
            try:
                value, end = reader.at(self.text, self.at)
            except RecursionError:
                raise DataError(f"{self.path}:{row}: {TOO_DEEP} → flatten it") from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _LONGEST_ESCAPE
                if cut and self._grow():
                    continue
                raise self.broken(error.msg, error.pos, row=row) from None
            if end == len(self.text) and isinstance(value, int | float) and self._grow():
                continue  # more digits may follow
            text, self.at = self.text[self.at : end], end
            return foreign_bytes(text) or value

    def broken(self, problem: str, place: int, *, row: int) -> DataError:
        """The error for a list that breaks off at a character of the text at hand."""
        line = self._line + self.text.count("\n", 0, place)
        start = self.text.rfind("\n", 0, place) + 1
        column = place - start + 1 + (self._column if start == 0 else 0)
        where = f"{problem}, line {line} column {column}"
        return DataError(f"{self.path}:{row}: broken JSON ({where}) → mend or delete this row")

    def _grow(self) -> bool:
        """Put as much text again behind what is left: a long row is decoded a few times only. False at the end."""
        pieces = [self.text[self.at :]]
        while sum(map(len, pieces[1:])) <= len(pieces[0]) and (more := next(self._chunks, "")):
            pieces.append(more)
        if len(pieces) == 1:
            return False
        passed = self.text.count("\n", 0, self.at)
        self._line += passed
        self._column = self.at - self.text.rfind("\n", 0, self.at) - 1 + (0 if passed else self._column)
        self.text, self.at = "".join(pieces), 0
        return True


def _text_chunks(file: Any) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    while chunk := file.read(_CHUNK):
        if text := decoder.decode(chunk):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
