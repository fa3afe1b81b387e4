"""Real files of peers, row by row; skipped where they aren't beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatalign.data.formats import format_of, normalise
from chatalign.recipe import DatasetSource

FILES = [
    ("alpaca_en_demo.json", "conversation", "alpaca"),
    ("alpaca_zh_demo.json", "conversation", "alpaca"),
    ("dpo_en_demo.json", "preference", "preference"),
    ("kto_en_demo.json", "unpaired", "unpaired"),
    ("glaive_toolcall_en_demo.json", "conversation", "sharegpt"),
]


def read(file: Path, kind: Any) -> tuple[list[dict[str, Any]], str, list[Any]]:
    rows = json.loads(file.read_text("utf-8"))
    source = DatasetSource(path=str(file))
    name = format_of(source, rows[0], kind)
    return rows, name, [normalise(row, source, name, kind) for row in rows]


@pytest.mark.parametrize(("file", "kind", "name"), FILES)
def test_every_row_is_read_in_the_format_that_its_columns_say(
    file: str, kind: Any, name: str, shared_data: Path
) -> None:
    rows, found, made = read(shared_data / file, kind)
    assert found == name
    assert len(made) == len(rows) >= 90


def test_every_call_and_every_result_of_the_tool_rows_comes_through(shared_data: Path) -> None:
    rows, _, made = read(shared_data / "glaive_toolcall_en_demo.json", "conversation")
    for row, conversation in zip(rows, made, strict=True):
        turns = row["conversations"]
        calls = [turn["tool_calls"] for turn in conversation.messages if "tool_calls" in turn]
        written = [json.loads(turn["value"]) for turn in turns if turn["from"] == "function_call"]
        assert [[call["function"] for call in turn] for turn in calls] == [
            one if isinstance(one, list) else [one] for one in written
        ]
        results = [turn["content"] for turn in conversation.messages if turn["role"] == "tool"]
        assert results == [turn["value"] for turn in turns if turn["from"] == "observation"]
        assert (conversation.tools or []) == (json.loads(row["tools"]) if row["tools"] else [])
    assert sum("tool_calls" in turn for one in made for turn in one.messages) > 100
