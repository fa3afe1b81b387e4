"""Every kind of file is read, with file and row kept; what can't be read is one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chatalign.data.sources import read_source
from chatalign.errors import ChatalignError, DataError, HubError
from chatalign.recipe import DatasetSource

ROWS = [{"prompt": "你好", "completion": "a,b\nc"}, {"prompt": "x", "completion": "y"}]


def read(path: Path | str, **source: Any) -> list[tuple[str, dict[str, Any]]]:
    return list(read_source(DatasetSource(path=str(path), **source)))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def lines(rows: list[dict[str, Any]], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def _csv(path: Path) -> Path:
    return write(path, 'prompt,completion\r\n你好,"a,b\nc"\r\nx,y\r\n')


def _parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


FILES = {
    "list.json": lambda path: write(path, json.dumps(ROWS)),
    "data.json": lambda path: write(path, json.dumps({"version": 1, "data": ROWS})),
    "bom.json": lambda path: write(path, "\ufeff" + json.dumps(ROWS)),
    "lines.json": lambda path: write(path, lines(ROWS)),
    "rows.jsonl": lambda path: write(path, lines(ROWS)),
    "crlf.jsonl": lambda path: write(path, "\ufeff" + lines(ROWS, "\r\n")),
    "rows.jsonl.gz": lambda path: write(path, gzip.compress(lines(ROWS).encode())),
    "list.json.gz": lambda path: write(path, gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv": _csv,
    "pandas.csv": lambda path: write(path, ',prompt,completion\n0,你好,"a,b\nc"\n1,x,y\n'),
    "rows.parquet": _parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file(name: str, tmp_path: Path) -> None:
    path = FILES[name](tmp_path / name)
    assert read(path) == [(f"{path}:1", ROWS[0]), (f"{path}:2", ROWS[1])]


def test_txt_lines_are_documents_numbered_as_in_an_editor(tmp_path: Path) -> None:
    path = write(tmp_path / "wiki.txt", "\ufeffone\r\n\r\ntwo\n")
    assert read(path) == [(f"{path}:1", {"text": "one"}), (f"{path}:3", {"text": "two"})]


def test_jsonl_rows_are_lines_even_with_empty_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n" + lines(ROWS))
    assert [where for where, _ in read(path)] == [f"{path}:2", f"{path}:3"]


def test_unicode_line_separators_inside_a_row_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines([{"text": "a\u2028b\x85c"}]))
    assert read(path) == [(f"{path}:1", {"text": "a\u2028b\x85c"})]


def test_a_folder_is_all_its_data_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", lines(ROWS))
    write(tmp_path / "a.json", json.dumps(ROWS[:1]))
    write(tmp_path / "README.md", "no data")
    assert [where for where, _ in read(tmp_path)] == [
        f"{tmp_path / 'a.json'}:1",
        f"{tmp_path / 'b.jsonl'}:1",
        f"{tmp_path / 'b.jsonl'}:2",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data files"):
        read(tmp_path / "empty")


def test_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert [row for _, row in read(tmp_path / "saved")] == ROWS
    with pytest.raises(DataError, match="has no split `test`; it has train"):
        read(tmp_path / "saved", split="test")


def test_max_rows_takes_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines(ROWS))
    assert len(read_source(DatasetSource(path=str(path), max_rows=1))) == 1
    assert read(path, max_rows=1) == [(f"{path}:1", ROWS[0])]


def test_the_hash_is_the_contents(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", lines(ROWS))
    two = write(tmp_path / "two.jsonl", lines(ROWS))
    sha = read_source(DatasetSource(path=str(one))).sha256
    assert sha == read_source(DatasetSource(path=str(two))).sha256
    write(two, lines(ROWS[::-1]))
    assert sha != read_source(DatasetSource(path=str(two))).sha256


BAD = {
    "cut.json": ('[{"a": 1},\n {"a": 2},\n {"a": ', ":3: broken JSON (Expecting value, line 3 column 8) → mend or"),
    "cut.jsonl": ('{"a": 1}\n{"a": \n', ":2: broken JSON (Expecting value, column 7) → mend or delete this row"),
    "row.jsonl": ('{"a": 1}\n3\n', ":2: holds an int, not an object → mend or delete this row"),
    "scalar.json": ("3", ": holds an int, not a list of rows; write a list of objects"),
    "object.json": ('{"a": 1}', ': a JSON object without one list of rows; write a list, or {"data": […]}'),
    "short.csv": ("a,b\n1,2\n3\n", ":2: has another number of fields than the header (1, not 2) → mend or"),
    "long.csv": ("a,b\n1,2,3\n", ":1: has another number of fields than the header (3, not 2) → mend or"),
    "latin.jsonl": (b'{"a": "\xe9"}', ":1: is not UTF-8 (byte 0xe9, character 8) → save the file as UTF-8"),
    "empty.jsonl": ("\n", ": holds no rows; give a file with at least one"),
    "rows.jsonl.gz": ("no gzip", ": can't be read (Not a gzipped file (b'no')); check the file"),
    "rows.xlsx": ("x", ": not a data file by its name; expected .json, .jsonl, .ndjson, .parquet, .csv, .txt (json"),
    "rows.parquet": ("no parquet", ": not a readable parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_broken_file_is_one_line(name: str, tmp_path: Path) -> None:
    text, line = BAD[name]
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}{line}")
    assert "\n" not in message


def test_broken_rows_can_be_kept_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": \n3\n{"a": 2}\n')
    rows = read_source(DatasetSource(path=str(path)), keep_broken=True)
    assert [row for _, row in rows] == [{"a": 1}, {"a": 2}]
    assert [row.place for row in rows.problems] == [f"{path}:2", f"{path}:3"]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*\(1 more such rows\)"):
        read(path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(ROWS))
    with pytest.raises(DataError, match=r"no such file; did you mean .*train\.jsonl\?"):
        read(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match="no such file, and no folder"):
        read(tmp_path / "nowhere" / "train.jsonl")


def test_a_hub_dataset_offline_is_a_typed_error() -> None:
    with pytest.raises(ChatalignError) as caught:
        read("nobody/nothing-at-all")
    assert isinstance(caught.value, HubError | DataError)
    assert "nobody/nothing-at-all" in str(caught.value)
    assert "\n" not in str(caught.value)
