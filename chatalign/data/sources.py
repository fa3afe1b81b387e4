"""Rows out of files, folders and the Hub, each with the file and row that errors name.

json (a list, or ``{"data": […]}``), jsonl, parquet, csv and txt; json, jsonl and txt may be gzipped. A BOM and CRLF
line ends are tolerated. In a txt file every line is a document. Reading happens here only; what the rows mean is
:mod:`chatalign.data.formats`' part.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from chatalign.artifact import fingerprint, sha256_file
from chatalign.data.rows import kind_of
from chatalign.errors import DataError, HubError
from chatalign.recipe import DatasetSource

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".txt")
_MEND = "mend or delete this row"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one file. `numbers` are the rows' places in it (lines, for jsonl and txt), from 1."""

    name: str
    rows: Sequence[dict[str, Any]]
    numbers: Sequence[int] | None = None

    def where(self, index: int) -> str:
        """``file:row`` of the row at `index`."""
        return f"{self.name}:{self.numbers[index] if self.numbers is not None else index + 1}"


@dataclass(frozen=True, slots=True)
class Rows:
    """The raw rows of one source, in order. Iterating gives ``(file:row, row)``."""

    source: DatasetSource
    parts: Sequence[Part]
    sha256: str
    problems: Sequence[str] = field(default=())  # rows that could not be read at all, as finished lines

    def __len__(self) -> int:
        total = sum(len(part.rows) for part in self.parts)
        return total if self.source.max_rows is None else min(total, self.source.max_rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        left = len(self)
        for part in self.parts:
            for i, row in enumerate(part.rows):
                if left == 0:
                    return
                left -= 1
                yield part.where(i), row


def read_source(source: DatasetSource, *, keep_broken: bool = False) -> Rows:
    """Every row of a source: a local file or folder where the path exists, else a Hub dataset.

    Rows that can't be parsed are in `problems` where `keep_broken` is true (``file:row: problem → mend``).
    Raises DataError for a path that is neither, a file that can't be read, a broken row or a source without rows;
    HubError where the Hub can't be reached.
    """
    place = Path(source.path)
    if place.is_dir():
        rows = _read_folder(source, place)
    elif place.is_file():
        part, problems = _read_file(place)
        rows = Rows(source, [part], sha256_file(place), problems)
    elif looks_local(source.path):
        raise DataError(missing_file(source.path))
    else:
        rows = _read_hub(source)
    if rows.problems and not keep_broken:
        more = f" ({len(rows.problems) - 1} more such rows)" if len(rows.problems) > 1 else ""
        raise DataError(rows.problems[0] + more)
    if len(rows) == 0 and not rows.problems:
        raise DataError(f"{source.path}: holds no rows; give a file with at least one")
    return rows


def looks_local(path: str) -> bool:
    """Whether a path that doesn't exist was meant as a file: a Hub id is ``owner/name`` without a data suffix."""
    place = Path(path)
    known = any(path.lower().endswith(end) for suffix in SUFFIXES for end in (suffix, suffix + ".gz"))
    return known or path.startswith((".", "/", "~")) or path.count("/") > 1 or (place.parent.is_dir() and "/" in path)


def missing_file(path: str) -> str:
    """One line for a file that isn't there, with the nearest name beside it."""
    place = Path(path)
    if not place.parent.is_dir():
        return f"{path}: no such file, and no folder {place.parent}; paths are relative to the working directory"
    near = get_close_matches(place.name, [entry.name for entry in place.parent.iterdir()], n=1)
    hint = f"did you mean {place.parent / near[0]}?" if near else "give the path of a data file or a Hub id"
    return f"{path}: no such file; {hint}"


def _read_folder(source: DatasetSource, folder: Path) -> Rows:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _read_saved(source, folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _reader(path) is not None]
    if not files:
        raise DataError(f"{folder}: holds no data files; expected {', '.join(SUFFIXES)}")
    read = [_read_file(path) for path in files]
    sha256 = fingerprint({path.relative_to(folder).as_posix(): sha256_file(path) for path in files})
    return Rows(source, [part for part, _ in read], sha256, [line for _, lines in read for line in lines])


def _reader(path: Path) -> Callable[[Path], tuple[Part, list[str]]] | None:
    name = path.name.lower().removesuffix(".gz")
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)


def _read_file(path: Path) -> tuple[Part, list[str]]:
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path}: not a data file by its name; expected {', '.join(SUFFIXES)} (json and txt also .gz)")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: can't be read ({error}); check the file") from None


def _read_text(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    return raw.decode("utf-8-sig")


def _read_json(path: Path) -> tuple[Part, list[str]]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":  # JSON lines under another name
            return _read_jsonl(path)
        raise DataError(_broken_json(path, text, error)) from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        if len(lists) != 1:
            raise DataError(f'{path}: a JSON object without one list of rows; write a list, or {{"data": […]}}')
        value = lists[0]
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {kind_of(value)}, not a list of rows; write a list of objects")
    return _objects(path, value, range(1, len(value) + 1))


def _broken_json(path: Path, text: str, error: json.JSONDecodeError) -> str:
    """The row in which a JSON list breaks off, found by decoding its elements one by one."""
    decoder = json.JSONDecoder()
    at, row = text.find("[") + 1, 1
    while 0 < at < len(text):
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        row += 1
    return f"{path}:{row}: broken JSON ({error.msg}, line {error.lineno} column {error.colno}) → {_MEND}"


def _read_jsonl(path: Path) -> tuple[Part, list[str]]:
    values, numbers, problems = [], [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
            numbers.append(number)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: broken JSON ({error.msg}, column {error.colno}) → {_MEND}")
    part, others = _objects(path, values, numbers)
    return part, problems + others


def _objects(path: Path, values: list[Any], numbers: Sequence[int]) -> tuple[Part, list[str]]:
    """Rows that are objects, and a line for each that isn't."""
    if all(isinstance(value, dict) for value in values):
        return Part(str(path), values, numbers), []
    kept = [(value, number) for value, number in zip(values, numbers, strict=True) if isinstance(value, dict)]
    problems = [
        f"{path}:{number}: holds {kind_of(value)}, not an object → {_MEND}"
        for value, number in zip(values, numbers, strict=True)
        if not isinstance(value, dict)
    ]
    return Part(str(path), [value for value, _ in kept], [number for _, number in kept]), problems


def _read_csv(path: Path) -> tuple[Part, list[str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows, numbers, problems = [], [], []
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():  # DictReader's marks for too many and too few fields
                problems.append(f"{path}:{number}: has another number of fields than the header → {_MEND}")
                continue
            rows.append({name: value if value != "" else None for name, value in row.items() if name})
            numbers.append(number)
    except csv.Error as error:
        raise DataError(f"{path}:{len(rows) + 1}: broken CSV ({error}) → {_MEND}") from None
    return Part(str(path), rows, numbers), problems


def _read_txt(path: Path) -> tuple[Part, list[str]]:
    lines = [line.rstrip("\r") for line in _read_text(path).split("\n")]
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    return Part(str(path), [{"text": lines[number - 1]} for number in numbers], numbers), []


def _read_parquet(path: Path) -> tuple[Part, list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); write it again") from None
    return Part(str(path), table.to_pylist()), []


_READERS: dict[str, Callable[[Path], tuple[Part, list[str]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_txt,
}


def _read_saved(source: DatasetSource, folder: Path) -> Rows:
    """A folder that ``Dataset.save_to_disk`` wrote."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise DataError(f"{folder}: has no split `{source.split}`; it has {', '.join(saved)}")
        saved = saved[source.split]
    return Rows(source, [Part(str(folder), saved)], _sha256_rows(saved))


def _read_hub(source: DatasetSource) -> Rows:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    label = source.path if source.name is None else f"{source.path}/{source.name}"
    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        reason = str(error).splitlines()[0]
        raise HubError(f"{label}: no such local file, and the Hub can't be reached ({reason}); give a file") from None
    except DatasetNotFoundError:
        raise DataError(
            f"{label}: no such local file or Hub dataset; mind the spelling, or log in if private"
        ) from None
    except ValueError as error:  # unknown configuration or split; datasets' message lists the right ones
        raise DataError(f"{label}: {' '.join(str(error).split())}") from None
    return Rows(source, [Part(label, loaded)], _sha256_rows(loaded))


def _sha256_rows(rows: Any) -> str:
    """The hash of a Dataset's content, wherever and in how many files it lies."""
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return sha256.hexdigest()
