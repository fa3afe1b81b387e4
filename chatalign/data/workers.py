"""Work on chunks of raw rows, here or in several processes: the same tables of tokens, errors and order.

A worker gets lines as they lie in the file, and does all that is to be done with a row; so this process only reads
and writes bytes, and more workers bring more speed.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import pyarrow

from chatalign.data.encode import Outcome, RowEncoder
from chatalign.data.files import Chunk
from chatalign.data.formats import normalise
from chatalign.data.mixing import prompt_hash
from chatalign.data.rows import BadRow, Row
from chatalign.errors import DataError
from chatalign.forked import end_with_parent
from chatalign.recipe import DatasetSource
from chatalign.recipe.sections import Format

Done = TypeVar("Done")
_AHEAD = 4  # chunks on their way for each worker: none waits, and few are held


@dataclass(frozen=True, slots=True)
class Task:
    """Rows of one source to encode. `hashed`: with the hash of what each asks."""

    chunk: Chunk
    source: DatasetSource
    format: Format
    hashed: bool


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a chunk's rows, in three lists with an item a row, and the `table` of those that were encoded.

    `places` are file:row; `hashes` are empty where they weren't asked for, and of bad rows.
    """

    places: list[str]
    hashes: list[str]
    outcomes: list[Outcome]
    table: pyarrow.Table


def rows_of(encoder: RowEncoder, task: Task) -> Iterator[tuple[str, Row | BadRow]]:
    """A chunk's rows in the schema (file:row, row); a bad one raises DataError where the recipe drops none."""
    for where, columns in task.chunk:
        try:
            yield where, normalise(columns, task.source, task.format, encoder.kind)
        except BadRow as bad:
            if encoder.section.on_bad_row == "error":
                raise DataError(f"{where}: {bad}") from None
            yield where, bad


def encode_task(encoder: RowEncoder, task: Task) -> Made:
    """Bring a chunk's rows to the schema and encode them; a bad row raises DataError where the recipe drops none."""
    places: list[str] = []
    hashes: list[str] = []
    rows: list[Row | BadRow] = []
    for where, row in rows_of(encoder, task):
        places.append(where)
        rows.append(row)
        hashes.append(prompt_hash(row) if task.hashed and not isinstance(row, BadRow) else "")
    good = [(row, place) for row, place in zip(rows, places, strict=True) if not isinstance(row, BadRow)]
    block = encoder.block([row for row, _ in good], [place for _, place in good])
    encoded = iter(block.outcomes)
    return Made(places, hashes, [row if isinstance(row, BadRow) else next(encoded) for row in rows], block.table)


class Workers:
    """`count` processes; with one, this process does the work. A context manager: at its end they are gone."""

    def __init__(self, count: int, encoder: RowEncoder, make_encoder: Callable[[], RowEncoder]) -> None:
        self.encoder = encoder
        self._ahead = _AHEAD * count if count > 1 else 0
        self._pool: ProcessPoolExecutor | None = None
        # What is there by now (torch and all) is no garbage: to search it takes as long as 1,000 rows, and copies it
        # in forked workers.
        self._froze = gc.get_freeze_count() == 0  # else it is another's to undo: see warm.import_once
        gc.freeze()
        if count > 1:
            # Forked where that can be, as by datasets' own num_proc: no imports again, and what the encoder has learnt.
            # A worker tokenizes only; torch's threads, which don't survive a fork, are not asked for anything.
            method = "fork" if sys.platform == "linux" else "spawn"
            encoder.learn_words()
            _worker[:] = [encoder]
            self._pool = ProcessPoolExecutor(count, get_context(method), _start_worker, (make_encoder,))

    def run(self, work: Callable[[RowEncoder, Task], Done], tasks: Iterable[Task]) -> Iterator[Done]:
        """What `work` made of the tasks, in order. The first is done here, while workers begin: it holds the rows that
        encoding verifies.
        """
        waiting: deque[Callable[[], Done]] = deque()
        for number, task in enumerate(tasks):
            here = self._pool is None or number == 0
            waiting.append(partial(work, self.encoder, task) if here else self._submit(work, task))
            if len(waiting) > self._ahead:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()

    def _submit(self, work: Callable[[RowEncoder, Task], Done], task: Task) -> Callable[[], Done]:
        assert self._pool is not None
        return self._pool.submit(_in_worker, work, task).result

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            _worker.clear()
        if self._froze:
            gc.unfreeze()


_worker: list[RowEncoder] = []


def _start_worker(make_encoder: Callable[[], RowEncoder]) -> None:
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if not _worker:
        _worker.append(make_encoder())
    _worker[0].trust()


def _in_worker(work: Callable[[RowEncoder, Task], Done], task: Task) -> Done:
    return work(_worker[0], task)
