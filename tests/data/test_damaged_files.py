"""Files damaged at random: whatever the bytes, rows or a DataError, and nothing is lost without a count."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from bad_rows import m
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatalign.data import check_data
from chatalign.data.files import Part, read_file
from chatalign.data.json_values import JsonReader, check_value
from chatalign.data.rows import BadRow, Broken, BrokenRow
from chatalign.errors import DataError
from chatalign.recipe import DataSection

ROWS = [{"messages": m(f"question {i}é", "yes 你好"), "id": i} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = 'prompt,completion\r\na,"b\n""c"""\r\nd,é\r\n'.encode()


def parquet() -> bytes:
    made = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), made)
    return made.getvalue()


WHOLE = {
    "f.jsonl": LINES,
    "list.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "object.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "lines.json": LINES,
    "f.csv": CSV,
    "f.txt": b"one\ntwo\nthree\n",
    "f.jsonl.gz": gzip.compress(LINES, mtime=0),
    "f.parquet": parquet(),
}
PIECES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"]",
    b",",
    b"\\",
    b"\\ud800",
    b"\n",
    b"\r",
    b"NaN",
    b"[" * 400,
    b"9" * 5000,
]


def read_or_why_not(path: Path) -> tuple[Part, list[BrokenRow]] | str:
    try:
        return read_file(path)
    except DataError as error:
        return str(error)


def why_refused(row: dict[str, Any]) -> str | None:
    try:
        check_value(row)
    except BadRow as bad:
        return str(bad)
    return None


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_a_data_error_or_a_broken_row(name: str, data: st.DataObject, tmp_path: Path) -> None:
    whole = WHOLE[name]
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 40)) | st.just(len(whole)))
    path = tmp_path / name
    path.write_bytes(whole[:start] + data.draw(st.sampled_from([b"", *PIECES]) | st.binary(max_size=6)) + whole[end:])
    kind = {"f.txt": "text"}.get(name, "conversation")
    problems = check_data(DataSection(datasets=[{"path": str(path)}]), kind)  # type: ignore[arg-type]
    assert all(problem.startswith(str(path)) and "\n" not in problem for problem in problems)
    read = read_or_why_not(path)
    if isinstance(read, str):
        assert read.startswith(str(path))
        assert "\n" not in read
        return
    part, broken = read
    rows = list(part)
    assert len(rows) == part.count
    places = [place for place, _ in rows] + [row.place for row in broken]
    assert len(set(places)) == len(places)
    numbers = sorted(int(place.rpartition(":")[2]) for place in places)
    if name.endswith((".csv", ".parquet", "list.json", "object.json")):
        assert numbers == list(range(1, len(numbers) + 1))  # no row between is missing


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(JSON)
def test_the_reader_is_pythons_but_for_what_it_names(value: Any) -> None:
    text = json.dumps(value)
    read = JsonReader().whole(text)
    if "NaN" in text or "Infinity" in text:
        assert isinstance(read, Broken) or read == value  # a text may hold these words
    else:
        assert read == value == json.loads(text)
    written = json.dumps(value, ensure_ascii=False)
    refused = why_refused({"column": value})
    if refused is None:
        written.encode()  # what tokenizers and arrow files do with it
        assert r"\u0000" not in written.replace(r"\\", "")
    else:
        assert refused.startswith("column")
        assert re.search(r"\\u(0000|d[89a-f])", text)
