"""docs/guard.md's table as the expectation of every mutant: a page that says something else than chatalign fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from chatalign.errors import ChatalignError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guard.md"
WHEN = ("check", "start", "step", "save", "load")
_ROW = re.compile(r"^\| (\d+) \| (.+?) \| (\w+) \| `(\w+): (.+)` \|$")


@dataclass(frozen=True)
class Guarded:
    """A row of the page: the failure, when it is named, the error's type, and its words with … for what varies."""

    failure: str
    when: str
    error: str
    words: str

    def fits(self, error: BaseException) -> bool:
        """Whether an error is of the row's type and has its words, in their order and from the first to the last."""
        pattern = ".*".join(re.escape(part) for part in self.words.replace("\\|", "|").split("…"))
        return type(error).__name__ == self.error and re.fullmatch(pattern, str(error), re.DOTALL) is not None


def guard_table() -> dict[int, Guarded]:
    """The page's rows by number; rows not written yet are left out."""
    found = {}
    for line in PAGE.read_text("utf-8").splitlines():
        if match := _ROW.match(line):
            found[int(match[1])] = Guarded(match[2], match[3], match[4], match[5])
    return found


def says(number: int, error: BaseException) -> None:
    """Assert that an error is what the page promises for a failure, in one line."""
    expected = guard_table()[number]
    promised, got = f"{expected.error}: {expected.words}", f"{type(error).__name__}: {error}"
    assert expected.fits(error), f"row {number} of docs/guard.md says\n  {promised}\nbut got\n  {got}"
    assert "\n" not in str(error)


@contextmanager
def named(number: int) -> Iterator[None]:
    """The block must raise what docs/guard.md promises for the failure `number`."""
    with pytest.raises(ChatalignError) as raised:
        yield
    says(number, raised.value)
