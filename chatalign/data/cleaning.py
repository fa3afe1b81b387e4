"""Which rows of ``datasets`` are left out by ``data.clean``, decided before any of them is tokenized.

Worker processes look at each row once and send what tells rows apart: hashes. This process keeps those of a fixed
size in memory and writes the n-grams to files beside the tokens, which go when all is decided. Rows are compared
within their side of a split; between the sides, by n-grams only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chatalign.data.languages import check_languages
from chatalign.data.mixing import Side
from chatalign.data.near_duplicates import banding, later_copies, minhash
from chatalign.data.ngrams import NO_HASHES, Hashes, Spilled, contained
from chatalign.data.profiles import Profiles
from chatalign.data.rows import Kind
from chatalign.errors import DataError
from chatalign.recipe import CleanSection

EXACT_DUPLICATE = "duplicate of an earlier row"
_BLOCK = 4096  # rows whose n-grams are looked up at once


def check_clean(clean: CleanSection, kind: Kind) -> None:
    """Load what workers need. Raises DataError for what can't be asked of `kind`, DependencyError for a package."""
    if kind == "text" and (clean.min_turns or clean.max_turns):
        raise DataError("`data.clean.min_turns` and `max_turns`: documents have no turns; take them out")
    if clean.languages:
        check_languages(clean.languages)
    if clean.near_duplicates:
        minhash()


def libraries(clean: CleanSection | None) -> dict[str, str]:
    """The versions of the libraries that decide which rows stay; one that isn't there has none."""
    asked = {"datasketch": clean and clean.near_duplicates, "py3langid": clean and clean.languages}
    return {name: version(name) for name in asked if asked[name] and find_spec(name)}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The rows of one file that are left out: their numbers as in file:row, in order, and why."""

    numbers: NDArray[np.int64]
    reasons: list[str]

    def between(self, first: int, last: int) -> dict[int, str]:
        """Those numbered `first` to `last`, with their reasons."""
        start, end = np.searchsorted(self.numbers, (first, last + 1))
        return dict(zip(self.numbers[start:end].tolist(), self.reasons[start:end], strict=True))


class Cleaner:
    """Sees the profile of every row, then says which rows of ``datasets`` are left out.

    The filters come first, then contamination, exact duplicates and near-duplicates, so that a row which is left out
    for itself is nobody's original. `rows` is how many rows of ``datasets`` there are at most; n-grams are written to
    `folder`. A context manager: at its end those files are gone.
    """

    def __init__(self, clean: CleanSection, *, rows: int, folder: Path) -> None:
        self.clean, self.folder, self.most, self.count = clean, folder, rows, 0
        bands = banding(clean.near_duplicates)[0] if clean.near_duplicates else 0
        self.files: list[tuple[int, str, int]] = []  # source, file and its first row here
        self.numbers = np.zeros(rows, np.int64)
        self.sides = np.zeros(rows, np.int8)
        self.reasons = np.zeros(rows, np.int16)  # places in `why`
        self.why = [""]
        self.digests = np.zeros((rows if clean.exact_duplicates else 0, 2), np.uint64)
        self.bands: Hashes = np.zeros((rows if bands else 0, bands), np.uint64)
        self.shingles: list[Spilled] = []
        self.ngrams = Spilled(folder, rows)
        self.held_out: list[Hashes] = []

    def add_held_out(self, profiles: Profiles) -> None:
        """Rows of ``eval_datasets``."""
        self.held_out.append(np.unique(profiles.ngrams.flat))

    def add(self, source: int, profiles: Profiles, sides: Sequence[Side]) -> None:
        """Rows of a source of ``datasets``, and their sides."""
        if not self.files or self.files[-1][:2] != (source, profiles.name):
            self.files.append((source, profiles.name, self.count))
        new = slice(self.count, self.count + len(profiles.numbers))
        self.numbers[new], self.sides[new] = profiles.numbers, sides
        self.reasons[new] = [self._why(reason) for reason in profiles.reasons]
        if self.clean.exact_duplicates:
            self.digests[new] = np.frombuffer(profiles.digests, np.uint64).reshape(-1, 2)
        if self.clean.near_duplicates and profiles.numbers:
            self.bands[new] = profiles.bands
            self.shingles = self.shingles or [Spilled(self.folder, self.most) for _ in profiles.shingles]
            for spilled, shingles in zip(self.shingles, profiles.shingles, strict=True):
                spilled.append(shingles)
        self.ngrams.append(profiles.ngrams)
        self.count = new.stop

    def __enter__(self) -> Cleaner:
        return self

    def __exit__(self, *_: object) -> None:
        for spilled in (self.ngrams, *self.shingles):
            spilled.close()

    def _why(self, reason: str) -> int:
        if reason not in self.why:
            self.why.append(reason)
        return self.why.index(reason)

    def decide(self) -> list[tuple[int, str, LeftOut]]:
        """The rows that are left out: source, file, and which of it."""
        clean = self.clean
        if clean.decontaminate:
            self._leave_out(self._contaminated(), f"shares {clean.decontaminate} words in a row with an eval row")
        for side in (Side.TRAIN, Side.EVAL):
            if clean.exact_duplicates:
                self._leave_out(self._duplicates(self._left(side)), EXACT_DUPLICATE)
            if clean.near_duplicates:
                copies = later_copies(self._left(side), self.bands, self.shingles, clean.near_duplicates)
                self._leave_out(copies, f"near-duplicate of an earlier row (Jaccard {clean.near_duplicates} or more)")
        ends = [first for _, _, first in self.files[1:]] + [self.count]
        return [
            (source, name, self._left_out(first, end))
            for (source, name, first), end in zip(self.files, ends, strict=True)
        ]

    def _left(self, side: Side) -> NDArray[np.int64]:
        return np.flatnonzero((self.sides[: self.count] == side) & (self.reasons[: self.count] == 0))

    def _leave_out(self, rows: Sequence[int] | NDArray[np.int64], reason: str) -> None:
        self.reasons[np.asarray(rows, np.int64)] = self._why(reason)

    def _left_out(self, first: int, end: int) -> LeftOut:
        rows = first + np.flatnonzero(self.reasons[first:end])
        return LeftOut(self.numbers[rows], [self.why[reason] for reason in self.reasons[rows]])

    def _duplicates(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        _, firsts = np.unique(self.digests[rows], axis=0, return_index=True)
        return np.delete(rows, firsts)

    def _contaminated(self) -> NDArray[np.int64]:
        """The rows to train on that share an n-gram with a row of either kind of held-out rows."""
        held_out = [self.ngrams[row] for row in self._left(Side.EVAL)]
        among = np.unique(np.concatenate([*self.held_out, *held_out, NO_HASHES]))
        found = np.zeros(self.count, np.bool_)
        for first in range(0, self.count, _BLOCK):
            values, row_of = self.ngrams.block(first, first + _BLOCK)
            found[row_of[contained(values, among)]] = True
        train = self._left(Side.TRAIN)
        return train[found[train]]
