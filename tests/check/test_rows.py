"""What the rows' counts say: copies and leaks, by content, in one process or several."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chatalign.data import checks
from chatalign.data.checks import look_at_data
from chatalign.recipe import DataSection
from check.conftest import Check, only, pair, question, write_recipe, write_rows


def look(path: Path | str, kind: Any = "conversation", **settings: Any) -> checks.DataLook:
    return look_at_data(DataSection(datasets=[{"path": str(path)}], **settings), kind)


def test_copies_are_counted_by_content(tmp_path: Path) -> None:
    turned = {"messages": [{"content": turn["content"], "role": turn["role"]} for turn in question(0)["messages"]]}
    other_reply = {"messages": [question(0)["messages"][0], {"role": "assistant", "content": "it is nothing."}]}
    rows = [question(0), question(1), turned, question(0), other_reply]
    assert look(write_rows(tmp_path / "rows.jsonl", rows)).duplicates == 2
    shifted = [pair(0), pair(0) | {"chosen": "no", "rejected": "it is 0."}, pair(0)]
    assert look(write_rows(tmp_path / "pairs.jsonl", shifted), "preference").duplicates == 1
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}], "content": ""}
    calls = [
        {"messages": [question(0)["messages"][0], call | {"tool_calls": [{"name": "add", "arguments": {"a": a}}]}]}
        for a in (1, 2, 1)
    ]
    assert look(write_rows(tmp_path / "calls.jsonl", calls)).duplicates == 1


def test_copies_are_a_note_and_none_where_the_recipe_leaves_them_out(place: Path, check: Check) -> None:
    assert [finding.status for finding in check()["duplicates"]] == ["ok"]
    write_rows(place / "rows.jsonl", [question(i % 4) for i in range(10)])
    assert "6 of 10 rows (60.0%) are exact copies of an earlier one" in only(check()["duplicates"], "note")
    clean = {"datasets": [{"path": "rows.jsonl"}], "clean": {"exact_duplicates": True}}
    write_recipe(place / "clean.yaml", data=clean)
    assert "6 of 10 rows (60.0%) are exact copies, which data.clean leaves out" in only(
        check(recipe="clean.yaml")["duplicates"], "ok"
    )


def test_leaking_rows_are_counted_and_fail_where_all_leak(place: Path, check: Check) -> None:
    asked = question(3)["messages"][0] | {"content": "WHAT  is 3?"}  # case and spaces make no other prompt
    write_rows(place / "eval.jsonl", [{"messages": [asked, question(3)["messages"][1]]}, question(99)])
    data = {"datasets": [{"path": "rows.jsonl"}], "eval_datasets": [{"path": "eval.jsonl"}], "max_length": 64}
    write_recipe(place / "sft.yaml", data=data)
    said = only(check()["leakage"], "note")
    assert "1 of 20 training rows (5.0%) ask what eval.jsonl asks; the stage leaves them out" in said
    write_rows(place / "eval.jsonl", [question(99)])
    assert only(check()["leakage"], "ok").endswith("none asks what eval.jsonl asks")
    write_rows(place / "eval.jsonl", [question(i) for i in range(20)])
    assert "every training prompt is in it too" in only(check()["rows"], "FAIL")


def test_several_processes_see_what_one_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps(question(i % 900)) for i in range(1500)]
    rows[700], rows[1200] = '{"messages": []}', '{"messages": '
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    alone = look(tmp_path / "rows.jsonl", eval_fraction=0.2)
    assert [line.split(": ")[0][-5:] for line in alone.problems] == ["l:701", ":1201"]
    assert (alone.rows, alone.duplicates) == (1498, 599)
    monkeypatch.setattr(checks, "_BYTES_FOR_WORKERS", 1)
    monkeypatch.setattr(checks, "_workers", lambda: 2)
    assert look(tmp_path / "rows.jsonl", eval_fraction=0.2) == alone


def test_a_file_that_breaks_off_or_is_empty_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress("\n".join(json.dumps(question(i)) for i in range(1200)).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-20])
    monkeypatch.setattr(checks, "_BYTES_FOR_WORKERS", 1)
    monkeypatch.setattr(checks, "_workers", lambda: 2)
    (problem,) = look(tmp_path / "rows.jsonl.gz").problems
    assert "rows.jsonl.gz: can't be read (" in problem
    (tmp_path / "empty.jsonl").write_text("")
    assert look(tmp_path / "empty.jsonl").problems == [
        f"{tmp_path}/empty.jsonl: holds no rows; give a file with at least one"
    ]


def test_max_rows_and_folders_are_looked_at_as_they_are_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [question(0), question(0), question(1)])
    write_rows(tmp_path / "b.jsonl", [question(1), question(2)])
    assert (whole := look(tmp_path)).rows == 5
    assert whole.duplicates == 2
    section = DataSection(datasets=[{"path": str(tmp_path), "max_rows": 4}])
    assert look_at_data(section, "conversation").rows == 4


@pytest.mark.parametrize(("share", "side"), [(1e-6, "evaluation"), (0.999999, "training"), (0.3, None)])
def test_a_side_without_rows_is_found_whatever_is_hashed(tmp_path: Path, share: float, side: str | None) -> None:
    write_rows(tmp_path / "rows.jsonl", [question(i) for i in range(1100)])
    problems = look(tmp_path / "rows.jsonl", eval_fraction=share).problems
    assert problems == ([] if side is None else [f"data.eval_fraction: {share} of 1100 rows leaves none for {side}"])
