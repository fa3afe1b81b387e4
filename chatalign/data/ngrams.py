"""Text as hashes of its word n-grams: what near-duplicates and contamination are told by.

A word is a run of letters and digits; a Chinese or Japanese character, which no space separates from the next, is a
word by itself. Case and white space don't count. Hashes have 64 bits, and are the same in every process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
NO_HASHES: Hashes = np.zeros(0, np.uint64)
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Chinese characters
_WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"
_WORDS = re.compile(_WORD)
_WORDS_AND_MARKS = re.compile(rf"{_WORD}|[^\w\s]")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no position's hash loses bits
_REMEMBERED = 200_000  # words whose hashes are kept: some 30 MB


def words(text: str) -> list[str]:
    """The words of a text, without punctuation."""
    return _WORDS.findall(text.casefold())


def words_and_marks(text: str) -> list[str]:
    """Words, and each mark of punctuation as one: ``3 - 4`` and ``3 + 4`` differ."""
    return _WORDS_AND_MARKS.findall(text.casefold())


class _WordHashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        value = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if len(self) < _REMEMBERED:
            self[word] = value
        return value


_hash_of = _WordHashes()


def ngrams(words: Sequence[str], n: int) -> Hashes:
    """The hash of each n words in a row, sorted, each once; of all of them together where they are fewer than n."""
    hashes = np.fromiter(map(_hash_of.__getitem__, words), np.uint64, len(words))
    n = min(n, len(hashes))
    grams = np.zeros(len(hashes) - n + 1 if n else 0, np.uint64)
    for place in range(n):
        grams = grams * _BASE + hashes[place : place + len(grams)]
    return np.unique(grams)


def contained(values: Hashes, among: Hashes) -> NDArray[np.bool_]:
    """Which of `values` are among others, which are sorted."""
    if not len(among):
        return np.zeros(len(values), np.bool_)
    places = np.searchsorted(among, values)
    places[places == len(among)] = 0
    return among[places] == values


@dataclass(frozen=True, slots=True)
class Ragged:
    """Arrays of several lengths, end to end: quick to send to another process, and to write."""

    flat: Hashes
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, arrays: Sequence[Hashes]) -> Ragged:
        """`arrays`, in order."""
        flat = np.concatenate(arrays) if arrays else NO_HASHES
        return cls(flat, np.fromiter(map(len, arrays), np.int64, len(arrays)))


class Spilled(Sequence[Hashes]):
    """Arrays in a nameless file, in order; only where each begins is in memory. First all are appended, then read."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        self._starts = np.zeros(rows + 1, np.int64)
        self._count = 0

    def append(self, arrays: Ragged) -> None:
        """Write arrays behind those that are there."""
        self._file.write(arrays.flat.tobytes())
        start, first = self._starts[self._count], self._count + 1
        self._count += len(arrays.lengths)
        self._starts[first : self._count + 1] = start + np.cumsum(arrays.lengths)

    def close(self) -> None:
        """The file goes."""
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        return self._read(self._starts[row], self._starts[row + 1])

    def _read(self, first: np.int64, last: np.int64) -> Hashes:
        # Read, not mapped: pages of a map count as this process's memory, as many as the file has.
        self._file.seek(int(first) * 8)
        return np.frombuffer(self._file.read(int(last - first) * 8), np.uint64)

    def block(self, first: int, last: int) -> tuple[Hashes, NDArray[np.int64]]:
        """The arrays of rows first to last, end to end, and the row of each item."""
        last = min(last, self._count)
        lengths = np.diff(self._starts[first : last + 1])
        return self._read(self._starts[first], self._starts[last]), np.repeat(np.arange(first, last), lengths)
