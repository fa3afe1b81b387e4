"""What can be known about the data before training, in seconds: no tokenizer, no torch, no network."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from chatalign.data.files import Chunk, Part, uncounted
from chatalign.data.formats import format_of, normalise
from chatalign.data.mixing import is_eval, prompt_hash
from chatalign.data.rows import BadRow, Broken, BrokenRow, Kind, Row
from chatalign.data.sources import looks_local, missing_file, read_source
from chatalign.errors import DataError
from chatalign.recipe import DataSection, DatasetSource
from chatalign.recipe.sections import Format

SHOWN = 20  # bad rows named one by one for each source; the rest are counted
_CHUNK = 500  # rows looked at together
_BYTES_FOR_WORKERS = 32 * 2**20  # a smaller file is read before the second process has begun to help
_AHEAD = 3  # chunks on their way for each worker


@dataclass(frozen=True)
class DataLook:
    """What one look at a section's local rows gave: `problems` as ``file:row: field: problem → mend``, and counts.

    `rows` are the good rows to train on, `duplicates` those among them that are word for word an earlier one, and
    `leaking` those whose prompt is in ``eval_datasets`` too. `prompts` are the hashes of what the rows ask. Both
    latter are known only where a split asks for them, duplicates where the caller does.
    """

    problems: list[str]
    rows: int = 0
    duplicates: int | None = None
    leaking: int | None = None


def check_data(section: DataSection, kind: Kind) -> list[str]:
    """Problems as lines ``file:row: field: problem → mend``; none means that every local row can be trained on.

    Reads every row of local files. Hub datasets are not fetched. With ``on_bad_row: drop`` bad rows are no
    problem, but a source without a good row is.
    """
    return look_at_data(section, kind, duplicates=False).problems


def look_at_data(section: DataSection, kind: Kind, *, duplicates: bool = True) -> DataLook:
    """As :func:`check_data`, with what is worth knowing beside it. Large files are read in several processes."""
    split = bool(section.eval_fraction or section.eval_datasets)  # else nobody asks for prompts: a fifth of the time
    look = _Look(section, kind, prompts=split, contents=duplicates, both_sides=not section.eval_datasets)
    sources = [*section.datasets, *section.eval_datasets]
    with ExitStack() as stack:
        pool = stack.enter_context(_pool(count)) if (count := _processes(sources)) > 1 else None
        sides = [
            [_look_at_source(source, look, pool) for source in side]
            for side in (section.datasets, section.eval_datasets)
        ]
    problems = [line for side in sides for seen in side for line in seen.problems]
    train, held_out = (_merged(side) for side in sides)
    known = not any(not Path(source.path).exists() for source in sources)
    if known and not problems:
        problems = _split_problems(section, train.prompts, set(held_out.prompts))
    return DataLook(
        problems,
        rows=train.good,
        duplicates=train.good - len(set(train.contents)) if duplicates else None,
        leaking=sum(map(set(held_out.prompts).__contains__, train.prompts)) if section.eval_datasets else None,
    )


def _split_problems(section: DataSection, train: list[str], held_out: set[str]) -> list[str]:
    """What is wrong with the sides of a split, by the hashes of what their rows ask."""
    problems = []
    if section.eval_fraction:
        split_off = sum(is_eval(digest, section.eval_fraction) for digest in train)
        if split_off in (0, len(train)):
            side = "evaluation" if split_off == 0 else "training"
            problems.append(f"data.eval_fraction: {section.eval_fraction} of {len(train)} rows leaves none for {side}")
    if train and set(train) <= held_out:
        problems.append("data.eval_datasets: every training prompt is in it too → give rows that training doesn't see")
    return problems


@dataclass(frozen=True)
class _Look:
    """What rows are looked at for: `prompts` and `contents` say whether their hashes are asked for.

    Where `both_sides` of ``eval_fraction`` are all that the prompts are asked for, a chunk that has shown rows of both
    gives no more of their hashes, which take a third of the time.
    """

    section: DataSection
    kind: Kind
    prompts: bool
    contents: bool
    both_sides: bool


@dataclass
class _Seen:
    """What was seen of some rows, in their order."""

    problems: list[str] = field(default_factory=list)
    good: int = 0
    prompts: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    format: Format | None = None


def _look_at_source(source: DatasetSource, look: _Look, pool: ProcessPoolExecutor | None) -> _Seen:
    """One source whole, its bad rows cut to the first few where they stop the run."""
    if not Path(source.path).exists():
        return _Seen([missing_file(source.path)] if looks_local(source.path) else [])
    try:
        seen = _merged(list(_chunks_seen(source, look, pool)))
    except DataError as error:
        return _Seen([str(error)])
    if not seen.good and not seen.problems:
        seen.problems = [f"{source.path}: holds no rows; give a file with at least one"]
    elif look.section.on_bad_row == "drop":
        first = f"{source.path}: not one of {len(seen.problems)} rows is good; the first: "
        seen.problems = [] if seen.good else [first + seen.problems[0]]
    elif len(seen.problems) > SHOWN:
        more = f"{source.path}: {len(seen.problems) - SHOWN} more bad rows → mend them, or data.on_bad_row: drop"
        seen.problems[SHOWN:] = [more]
    return seen


def _chunks_seen(source: DatasetSource, look: _Look, pool: ProcessPoolExecutor | None) -> Iterator[_Seen]:
    """Each chunk of a source as it was seen, in order; the first ones here, until a row has told the format."""
    parts, problems = _parts(source)
    yield _Seen(problems)
    format_: Format | None = None
    waiting: deque[Future[_Seen]] = deque()
    for part in parts:
        for chunk in part.chunks(_CHUNK):
            if pool is None or format_ is None:
                seen = _look_at_chunk(chunk, source, look, format_)
                format_ = seen.format
                yield seen
                continue
            waiting.append(pool.submit(_look_at_chunk, chunk, source, look, format_))
            if len(waiting) > _AHEAD * _workers():
                yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _parts(source: DatasetSource) -> tuple[list[Part], list[str]]:
    """A source's files, to be read once; where only some of the rows are wanted or it is a folder, counted first."""
    if Path(source.path).is_file() and source.max_rows is None:
        return [uncounted(Path(source.path))], []
    rows = read_source(source, keep_broken=True)
    parts, left = [], len(rows)
    for part in rows.parts:
        parts.append(part.head(min(part.count, left)))
        left -= parts[-1].count
    return parts, [str(row) for row in rows.problems]


def _look_at_chunk(chunk: Chunk, source: DatasetSource, look: _Look, format_: Format | None) -> _Seen:
    """A chunk's rows brought to the schema; raises DataError where the source's format is not to be told."""
    seen = _Seen(format=format_)
    sides: set[bool] = set()
    for number, columns in chunk.all():
        place = f"{chunk.name}:{number}"
        if isinstance(columns, Broken):
            seen.problems.append(str(BrokenRow(place, columns)))
            continue
        try:
            seen.format = seen.format or format_of(source, columns, look.kind, place=place)
            row = normalise(columns, source, seen.format, look.kind)
        except BadRow as bad:
            seen.problems.append(f"{place}: {bad}")
            continue
        seen.good += 1
        if look.prompts and not (look.both_sides and len(sides) == 2):
            seen.prompts.append(prompt_hash(row))
            sides.add(is_eval(seen.prompts[-1], look.section.eval_fraction))
        if look.contents:
            seen.contents.append(_content_hash(row))
    return seen


def _content_hash(row: Row) -> bytes:
    """16 bytes for a whole row of the schema, of whatever format: the same where every word is."""
    digest = hashlib.sha256()
    for name in row.__slots__:
        value = getattr(row, name)
        # Turns by their texts: most are role and content, and to write them as JSON takes ten times as long.
        if isinstance(value, list) and all(len(turn) == 2 for turn in value):
            value = "\x1e".join([f"{turn.get('role')}\x1f{turn.get('content')}" for turn in value])
        digest.update(value.encode() if isinstance(value, str) else repr(value).encode())
        digest.update(b"\x1d")
    return digest.digest()[:16]


def _merged(parts: list[_Seen]) -> _Seen:
    whole = _Seen()
    for part in parts:
        whole.problems += part.problems
        whole.good += part.good
        whole.prompts += part.prompts
        whole.contents += part.contents
    return whole


def _processes(sources: list[DatasetSource]) -> int:
    """How many processes are worth starting for these files."""
    sizes = [Path(source.path).stat().st_size for source in sources if Path(source.path).is_file()]
    return _workers() if sum(sizes) >= _BYTES_FOR_WORKERS else 1


def _workers() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def _pool(count: int) -> ProcessPoolExecutor:
    # Forked where that can be: nothing is imported again, and a worker asks nothing of threads that don't survive it.
    return ProcessPoolExecutor(count, get_context("fork" if sys.platform == "linux" else "spawn"))
