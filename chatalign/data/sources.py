"""Rows out of files, folders and the Hub, each with the file and row that errors name.

json (a list, or ``{"data": […]}``), jsonl, parquet, csv and txt; json, jsonl and txt may be gzipped. A BOM and CRLF
line ends are tolerated. In a txt file every line is a document. Files are read in :mod:`chatalign.data.files`; what
the rows mean is :mod:`chatalign.data.formats`' part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

from chatalign.artifact import fingerprint, sha256_file
from chatalign.data.files import SUFFIXES, Chunk, Part, is_data_file, read_file
from chatalign.data.rows import BrokenRow
from chatalign.errors import DataError, HubError
from chatalign.recipe import DatasetSource

_HASHED = 100  # rows of a Dataset hashed together, always as many: else equal rows would differ in hash


@dataclass(frozen=True, slots=True)
class Rows:
    """The raw rows of one source, in order. Iterating gives ``(file:row, row)``."""

    source: DatasetSource
    parts: Sequence[Part]
    sha256: str
    problems: Sequence[BrokenRow] = field(default=())  # rows that could not be read at all

    def __len__(self) -> int:
        total = sum(part.count for part in self.parts)
        return total if self.source.max_rows is None else min(total, self.source.max_rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return islice(chain.from_iterable(self.parts), len(self))

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The same rows, some `size` at a time, for worker processes: where a row is a line, the lines as they are."""
        left = len(self)
        for part in self.parts:
            part = part if part.count <= left else part.head(left)
            left -= part.count
            yield from part.chunks(size)


def read_source(source: DatasetSource, *, keep_broken: bool = False) -> Rows:
    """Every row of a source: a local file or folder where the path exists, else a Hub dataset.

    Rows that can't be parsed are in `problems` where `keep_broken` is true.
    Raises DataError for a path that is neither, a file that can't be read, a broken row or a source without rows;
    HubError where the Hub can't be reached.
    """
    place = Path(source.path)
    if place.is_dir():
        rows = _read_folder(source, place)
    elif place.is_file():
        part, problems = read_file(place)
        rows = Rows(source, [part], sha256_file(place), problems)
    elif looks_local(source.path):
        raise DataError(missing_file(source.path))
    else:
        rows = _read_hub(source)
    if rows.problems and not keep_broken:
        more = f" ({len(rows.problems) - 1} more such rows)" if len(rows.problems) > 1 else ""
        raise DataError(f"{rows.problems[0]}{more}")
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
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_data_file(path)]
    if not files:
        raise DataError(f"{folder}: holds no data files; expected {', '.join(SUFFIXES)}")
    read = [read_file(path) for path in files]
    sha256 = fingerprint({path.relative_to(folder).as_posix(): sha256_file(path) for path in files})
    return Rows(source, [part for part, _ in read], sha256, [row for _, broken in read for row in broken])


def _read_saved(source: DatasetSource, folder: Path) -> Rows:
    """A folder that ``Dataset.save_to_disk`` wrote."""
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{folder}: not a readable saved Dataset ({str(error).splitlines()[0]}); save it again"
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise DataError(f"{folder}: has no split `{source.split}`; it has {', '.join(saved)}")
        saved = saved[source.split]
    return Rows(source, [_dataset_part(str(folder), saved)], _sha256_rows(saved))


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
    return Rows(source, [_dataset_part(label, loaded)], _sha256_rows(loaded))


def _dataset_part(name: str, dataset: Any) -> Part:
    return Part(name, len(dataset), lambda: enumerate(dataset, start=1))


def _sha256_rows(rows: Any) -> str:
    """The hash of a Dataset's content, wherever and in how many files it lies."""
    arrow = rows.with_format("arrow")
    sha256 = hashlib.sha256(str(arrow.data.schema.remove_metadata()).encode())
    for table in arrow.iter(batch_size=_HASHED):
        # Taken, which copies: a slice of a longer array would keep bits of its neighbours.
        for batch in table.combine_chunks().take(list(range(len(table)))).to_batches():
            sha256.update(batch.serialize())
    return sha256.hexdigest()
