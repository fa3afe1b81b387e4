"""More processes give the same rows, accounts and errors as one; a worker gets lines and parses them."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_families import BY_NAME, tokenizer_of

from chatalign.data import files, prepare, workers
from chatalign.data.encode import RowEncoder
from chatalign.data.sources import read_source
from chatalign.errors import ChatalignError, DataError
from chatalign.recipe import DataSection, DatasetSource

TOKENIZER = tokenizer_of(BY_NAME["chatml"])
EMPTY = {"prompt": "x", "completion": ""}
LONG = {"prompt": "why", "completion": "because " * 60}


@pytest.fixture(autouse=True)
def nothing_kept() -> Any:
    datasets.disable_caching()
    yield
    datasets.enable_caching()


def qa(i: int) -> dict[str, Any]:
    return {"prompt": f"Question {i % 700}?", "completion": f"reply {i} 你好"[: 12 - i % 3]}


def write(path: Path, lines: list[str]) -> str:
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8-sig"))
    return str(path)


def made_with(count: int, path: str, **settings: Any) -> Any:
    section = DataSection(datasets=[{"path": path, **settings.pop("source", {})}], num_proc=count, **settings)
    try:
        made = prepare(section, TOKENIZER, "conversation", seed=0)
    except ChatalignError as error:
        return f"{type(error).__name__}: {error}"
    return made.train[:], made.eval and made.eval[:], made.used


def some_lines(count: int) -> list[str]:
    """Good rows among blank lines, broken JSON and rows that are no demonstrations."""
    lines = [json.dumps(qa(i), ensure_ascii=i % 2 == 0) for i in range(count)]
    lines[3], lines[270], lines[600], lines[601] = "", '{"prompt": ', json.dumps(EMPTY), "  "
    return lines


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt"])
def test_chunks_hold_the_rows_in_order_with_their_numbers(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, some_lines(900))
    for max_rows in (None, 1, 268, 269, 10_000):
        rows = read_source(DatasetSource(path=path, max_rows=max_rows), keep_broken=True)
        chunks = list(rows.chunks(250))
        assert [row for chunk in chunks for row in chunk] == list(rows)
        assert len(list(rows)) == len(rows)
        assert all(list(chunk) == list(chunk) for chunk in chunks)  # where errors look again
    assert all(isinstance(line, bytes) for _, line in chunks[0].numbered)  # for the workers to parse


def test_few_long_lines_are_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 1000)
    path = write(
        tmp_path / "rows.jsonl", [json.dumps({"text": "a" * size}) for size in (10, 10, 2000, 10, 600, 600, 10)]
    )
    (part,) = read_source(DatasetSource(path=path)).parts
    assert [[number for number, _ in chunk.good()] for chunk in part.chunks(250)] == [[1, 2, 3], [4, 5, 6], [7]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_and_accounts_are_those_of_one_process(suffix: str, tmp_path: Path) -> None:
    lines = some_lines(1300)
    if suffix == ".json":
        lines = ["[", ",\n".join(line for line in lines if line.strip() and line != '{"prompt": '), "]"]
    path = write(tmp_path / f"rows{suffix}", lines)
    held_out = write(tmp_path / "held_out.jsonl", [json.dumps(qa(i)) for i in range(5, 400, 9)])
    for settings in (
        {},
        {"eval_fraction": 0.2},
        {"eval_datasets": [{"path": held_out}]},
        {"source": {"max_rows": 700}},
        {"max_length": 41, "on_overlong": "drop", "supervise": "all"},
    ):
        one = made_with(1, path, on_bad_row="drop", **settings)
        assert not isinstance(one, str)
        assert made_with(3, path, on_bad_row="drop", **settings) == one


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({700: EMPTY, 900: EMPTY}, ":701: completion: is empty → write the text"),
        ({700: LONG, 900: EMPTY}, ":701: longer than max_length (64) → raise it"),
        ({260: LONG, 270: EMPTY}, ":271: completion: is empty"),  # a chunk is read before it is encoded
        ({100: {"prompt": "x"}}, ":101: completion: is missing"),
        ({1100: {"question": "x"}}, ":1101: prompt: is missing"),
    ],
)
def test_errors_are_those_of_one_process(bad: dict[int, Any], expected: str, tmp_path: Path) -> None:
    rows = [bad.get(i, qa(i)) for i in range(1200)]
    path = write(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    one = made_with(1, path, max_length=64, on_overlong="error")
    assert expected in one
    assert made_with(3, path, max_length=64, on_overlong="error") == one


def test_rows_before_the_first_with_the_mapped_columns_are_counted(tmp_path: Path) -> None:
    rows = [{"q": "x", "a": "y"} if i in (700, 720) else {"b": 1} for i in range(900)]
    path = write(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    source = {"columns": {"prompt": "q", "completion": "a"}}
    for count in (1, 3):
        _, _, (used,) = made_with(count, path, source=source, on_bad_row="drop")
        assert (used.rows, used.used, used.format) == (900, 2, "prompt_completion")
        assert sum(used.dropped.values()) == 898


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """As in a process of a user's own: tests/conftest.py keeps what pytest imported from the garbage collector."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_workers_parse_and_encode_and_this_process_the_first_chunk_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, here = RowEncoder.block, []
    monkeypatch.setattr(RowEncoder, "block", lambda *rows: (here.append(os.getpid()), encode(*rows))[1])
    path = write(tmp_path / "rows.jsonl", [json.dumps(qa(i)) for i in range(1500)])
    assert len(made_with(2, path)[0]["input_ids"]) == 1500
    assert here == [os.getpid()]
    assert gc.get_freeze_count() == 0
    assert workers._worker == []


def test_an_error_ends_the_workers(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [json.dumps(qa(i)) for i in range(600)] + [json.dumps(EMPTY)] * 600)
    section = DataSection(datasets=[{"path": path}], num_proc=2)
    with pytest.raises(DataError, match=r"rows\.jsonl:601: completion: is empty"):
        prepare(section, TOKENIZER, "conversation", seed=0)
    assert workers._worker == []
