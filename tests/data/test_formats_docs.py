"""Every row and every key of the formats' page is run as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from peer_rows import PEER_ROWS

from chatalign.data.formats import KINDS_OF, format_of, normalise
from chatalign.data.rows import Kind
from chatalign.data.turns import _ROLES
from chatalign.errors import DataError
from chatalign.recipe import DatasetSource
from chatalign.recipe.sections import Role

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text("utf-8")
SECTION = PAGE.split("\n## Formats, by example\n")[1].split("\n## ")[0]
KIND_OF_STAGE: dict[str, Kind] = {
    "sft": "conversation",
    "reward": "preference",
    "dpo": "preference",
    "kto": "unpaired",
    "ppo": "prompt",
    "pretrain": "text",
}


def table(heads: str) -> list[list[str]]:
    """The cells of the table under these heads."""
    lines = SECTION.split(f"\n{heads}\n")[1].splitlines()[1:]
    rows = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


EXAMPLES = table("| format | a row | for |")
MADE_FOR = table("| made for | its columns | write |")


@pytest.mark.parametrize(("name", "row", "stages"), EXAMPLES, ids=[cells[0] for cells in EXAMPLES])
def test_a_row_of_the_table_is_its_format_for_its_stages(name: str, row: str, stages: str) -> None:
    columns = json.loads(row.strip("`"))
    format_ = re.findall(r"`(\w+)`", name)[0]
    fitting = {KIND_OF_STAGE[stage] for stage in stages.split(", ")}
    assert set(KINDS_OF[format_]) == fitting
    for kind in get_args(Kind):
        source = DatasetSource(path="rows.json")
        if kind in fitting:
            assert format_of(source, columns, kind) == format_
            normalise(columns, source, format_, kind)
        else:
            with pytest.raises(DataError, match=f"holds {format_} rows|say `format: "):
                format_of(source, columns, kind)


def test_the_table_has_every_format() -> None:
    assert {re.findall(r"`(\w+)`", name)[0] for name, *_ in EXAMPLES} == KINDS_OF.keys()


@pytest.mark.parametrize(("made_for", "columns", "key"), MADE_FOR, ids=[cells[0] for cells in MADE_FOR])
def test_a_key_for_another_librarys_file_is_the_one_that_its_error_names(made_for: str, columns: str, key: str) -> None:
    names = set(re.findall(r"`(\w+)`", columns))
    rows = [row for row in PEER_ROWS if row.row.keys() == names and row.says == key]
    assert rows, f"no row of peer_rows.py has the columns of {made_for}"
    for row in rows:
        source = DatasetSource(path="rows.json", **yaml.safe_load("{" + key.strip("`") + "}"))
        assert normalise(row.row, source, format_of(source, row.row, row.kind), row.kind) == row.wanted


def test_roles_on_the_page_are_the_codes() -> None:
    line = next(line for line in SECTION.splitlines() if line.startswith("- `roles:`"))
    targets, known = line.split("Known without it are also ")
    assert set(get_args(Role)) <= set(re.findall(r"`(\w+)`", targets))
    assert {*re.split(r", | and ", known.rstrip(".")), *get_args(Role)} == _ROLES.keys()
