"""docs/guard.md has fifty rows, and each is held by a mutant."""

from __future__ import annotations

import ast
from pathlib import Path

from chatalign import errors
from mutants.guard_table import WHEN, guard_table


def held() -> set[int]:
    """The numbers that the tests beside this one hand to `named` or `says`."""
    numbers = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("named", "says"):
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    numbers.add(first.value)
    return numbers


def test_every_row_is_held_by_a_mutant() -> None:
    assert set(guard_table()) == held()


def test_rows_name_a_moment_and_an_error() -> None:
    for number, row in guard_table().items():
        assert row.when in WHEN, number
        assert issubclass(getattr(errors, row.error, type(None)), errors.ChatalignError), number
