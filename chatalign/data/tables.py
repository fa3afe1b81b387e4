"""Rows out of CSV and parquet files, batch by batch."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chatalign.data.opening import foreign_bytes, open_text
from chatalign.data.rows import Broken
from chatalign.errors import DataError

Numbered = Iterator[tuple[int, Any]]  # (the row's place in the file, from 1; the row, or a Broken in its stead)
_MARK = "\ufeff"  # a byte order mark
_BATCH_ROWS, _BATCH_BYTES = 1000, 1 << 20  # of a parquet file, at once
_BUFFER = 1 << 16  # bytes of a parquet column read at once


def csv_rows(path: Path) -> Numbered:
    """The records under the header; an empty cell is None, a column without a name (pandas' index) is left out.

    Raises DataError for a header that names no columns, or two alike, and for a quote that no other closes: where
    the next record begins is then unknown.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_text(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        records = csv.reader(text, strict=True)
        names = _header(path, records)
        number = 0
        while True:
            before, number = records.line_num, number + 1
            try:
                cells = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                if records.line_num > before + 1 or str(error) == "unexpected end of data":
                    problem = f"broken CSV (a quote opens in line {before + 1} and isn't closed in it)"
                    raise DataError(f"{path}:{number}: {problem} → close it") from None
                yield number, Broken("broken CSV", f"{error}, line {records.line_num}")
                continue
            if cells:
                yield number, _record(names, cells)
            else:
                number -= 1  # a blank line


def _header(path: Path, records: Iterator[list[str]]) -> Sequence[str]:
    try:
        names = next(records, [])
    except csv.Error as error:
        raise DataError(f"{path}: header: broken CSV ({error}) → mend it") from None
    if broken := foreign_bytes("".join(names)):
        raise DataError(f"{path}: header: {broken.reason} ({broken.detail}) → {broken.mend}")
    if names and names[0].startswith(_MARK):
        raise DataError(f"{path}: header: begins with a second byte order mark → take it out")
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise DataError(f"{path}: header: columns stand apart by {mark!r} → write commas")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise DataError(f"{path}: header: two columns are named {twice[0]!r} → rename one")
    return names


def _record(names: Sequence[str], cells: Sequence[str]) -> Any:
    if broken := foreign_bytes("".join(cells)):
        return broken
    if len(cells) != len(names):
        return Broken("has another number of fields than the header", f"{len(cells)}, not {len(names)}")
    if cells[0].startswith(_MARK):
        return Broken("begins with a byte order mark", mend="take it out (joined files leave one in the middle)")
    return {name: cell if cell != "" else None for name, cell in zip(names, cells, strict=True) if name}


def parquet_rows(path: Path) -> Numbered:
    """The rows of a parquet file, some at a time: as many as take a few megabytes, however long they are."""
    number = 0
    for batch in _parquet_batches(path):
        for row in batch.to_pylist() if _is_text(batch) else [_one_row(batch.slice(i, 1)) for i in range(len(batch))]:
            number += 1
            yield number, row


def parquet_broken(path: Path) -> Numbered:
    """The rows of a parquet file whose text is none, without making the others; reads it all, to see that it can be."""
    start = 0
    for batch in _parquet_batches(path):
        if not _is_text(batch):
            rows = (_one_row(batch.slice(i, 1)) for i in range(len(batch)))
            yield from ((start + i, row) for i, row in enumerate(rows, start=1) if isinstance(row, Broken))
        start += len(batch)


def parquet_count(path: Path) -> int:
    """How many rows a parquet file says that it has; raises DataError where it is none, or has two columns alike."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
        names = metadata.schema.to_arrow_schema().names
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_parquet(path, error) from None
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: two columns are named {twice[0]!r} → rename one")
    return int(metadata.num_rows)


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffered: else a whole row group, often the whole file, is held before its first row is there.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                bytes_a_row = metadata.total_byte_size // max(metadata.num_rows, 1) + 1
                rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // bytes_a_row))
                yield from file.iter_batches(rows, row_groups=[group])
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_parquet(path, error) from None


def _is_text(batch: Any) -> bool:
    """Whether all strings are UTF-8, which parquet readers don't look at."""
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def _one_row(batch: Any) -> Any:
    if _is_text(batch):
        return batch.to_pylist()[0]
    return Broken("holds text that is not UTF-8", mend="write its text again as UTF-8")


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); write it again")
