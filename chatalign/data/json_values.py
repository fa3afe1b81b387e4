"""JSON text to values, and which values are refused although Python takes them.

Python's reader keeps the last of two equal keys, takes ``NaN``, which is no JSON, and makes half characters out of
``"\\ud800"``; NUL characters and values nested a thousand deep come through until a tokenizer or a template falls over
them. Each of these is a mistake that a training run would hide, so each is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from chatalign.data.rows import BadRow, Broken

DEEPEST = 100  # levels of lists and objects in a row; tool schemas have about ten
_LONGEST_NUMBER = 1000  # digits; Python itself fails from 4,300 on
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
TOO_DEEP = f"is nested more than {DEEPEST} levels deep"


class JsonReader:
    """Decodes JSON values. Where one can be decoded and must not be taken, it gives a Broken in its stead."""

    def __init__(self) -> None:
        self._found: Broken | None = None  # what is wrong somewhere inside the value at hand
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int
        )

    def whole(self, text: str) -> Any:
        """The value that `text` is; raises JSONDecodeError where it is none."""
        self._found = None
        try:
            value = self._decoder.decode(text)
        except RecursionError:
            return Broken(TOO_DEEP, mend="flatten it")
        return value if self._found is None else self._found

    def at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that starts at a character, and where it ends; raises JSONDecodeError, or RecursionError."""
        self._found = None
        value, end = self._decoder.raw_decode(text, start)
        return (value if self._found is None else self._found), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs) and self._found is None:
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._found = Broken(f"{printable(twice)}: stands twice in one object", mend="keep one")
        return made

    def _constant(self, name: str) -> None:
        self._found = self._found or Broken(f"{name} is not JSON", mend="write null, or leave the key out")

    def _int(self, digits: str) -> int:
        if len(digits) <= _LONGEST_NUMBER:
            return int(digits)
        self._found = self._found or Broken(f"a number of more than {_LONGEST_NUMBER} digits", mend="write it as text")
        return 0


def printable(text: str) -> str:
    """A key as a message can show it: escaped where it holds what no terminal takes, cut where it is long."""
    shown = text.encode("unicode_escape").decode() if _NO_TEXT.search(text) else text
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


def check_value(value: Any, field: str = "") -> None:
    """Raise BadRow where a text holds what no tokenizer takes (NUL, half a surrogate pair), or lists nest too deep.

    `value` is a whole row, or what stands in a `field`.
    """
    if _sound(value):
        return
    for place, depth, leaf in _leaves(value, field):
        if depth > DEEPEST:
            raise BadRow(place.partition("[")[0].partition(".")[0], TOO_DEEP, "flatten it")
        found = _NO_TEXT.search(leaf) if isinstance(leaf, str) else None
        if found and found[0] == "\0":
            raise BadRow(place, "holds a NUL character", f"take it out (character {found.start() + 1})")
        if found:
            escape = f"\\u{ord(found[0]):04x}"
            mend = f"write the whole character ({escape}, character {found.start() + 1}, is one half)"
            raise BadRow(place, "holds half of a surrogate pair", mend)


def _sound(value: Any) -> bool:
    """Whether all is well: the quick look that every row takes, without the names of fields."""
    level, texts = [value], []
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for one in level:
            kind = type(one)
            if kind is str:
                texts.append(one)
            elif kind is dict:
                texts.extend(one)
                inner.extend(one.values())
            elif kind is list or kind is tuple:
                inner.extend(one)
        if not inner:
            return _is_text("".join(texts))
        level = inner
    return False


def _is_text(text: str) -> bool:
    if "\0" in text:
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _leaves(value: Any, field: str) -> Iterator[tuple[str, int, Any]]:
    """Every value that holds no others, keys too, in order: its field (``messages[0].content``), depth, value."""
    waiting: list[tuple[str, int, Any]] = [(field, 1, value)]
    while waiting:
        field, depth, value = waiting.pop()
        inner: list[tuple[str, int, Any]] = []
        if depth > DEEPEST or not isinstance(value, dict | list | tuple):
            yield field, depth, value
        elif isinstance(value, dict):
            for key, one in value.items():
                name = f"{field}.{printable(str(key))}" if field else printable(str(key))
                inner += [(name, depth + 1, key), (name, depth + 1, one)]
        else:
            inner = [(f"{field}[{i}]", depth + 1, one) for i, one in enumerate(value)]
        waiting += inner[::-1]
