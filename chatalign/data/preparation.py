"""From the recipe's ``data:`` section to tokenized datasets, with an account of every row that was left out."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from chatalign.artifact import DataUsed, write_json
from chatalign.data.encode import Block, RowEncoder, table_schema
from chatalign.data.formats import format_of, normalise
from chatalign.data.lengths import Dropped
from chatalign.data.mixing import is_eval, mixture, prompt_hash
from chatalign.data.rows import BadRow, Kind, Row
from chatalign.data.sources import Rows, read_source
from chatalign.data.store import TableFile, stored, tokens_key
from chatalign.errors import DataError
from chatalign.recipe import DataSection, DatasetSource

logger = logging.getLogger(__name__)
LOST_TARGETS_LIMIT = 0.01  # a larger share of rows without targets is a mistake in max_length, not in the rows
_CHUNK = 250  # rows encoded at once: enough for a tokenizer's batch, and few to hold


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows (columns by kind: see :mod:`chatalign.data.encode`) and what became of each source's rows."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    used: list[DataUsed]


@dataclass
class _Source:
    """One source while it is prepared."""

    source: DatasetSource
    raw: Rows
    format: str = ""
    dropped: Counter[str] = field(default_factory=Counter)
    lost_targets: int = 0
    used: int = 0
    train_rows: int = 0

    @property
    def total(self) -> int:
        """Rows of the source, broken ones too."""
        return len(self.raw) + len(self.raw.problems)

    def account(self) -> DataUsed:
        """The record for ``artifact.json``."""
        return DataUsed(
            path=self.source.path,
            sha256=self.raw.sha256,
            format=self.format,
            rows=self.total,
            used=self.used,
            dropped=dict(sorted(self.dropped.items())),
        )


@dataclass(frozen=True, slots=True)
class _Item:
    """A row on its way to a side; `where` is its file:row."""

    where: str
    row: Row
    evaluated: bool


def prepare(section: DataSection, tokenizer: Any, kind: Kind, *, seed: int, eos_for_text: bool = True) -> Prepared:
    """Read, check, split, encode, cut to length and mix the rows of a ``data:`` section.

    The tokens come from disk where the same rows were prepared before (see :mod:`chatalign.data.store`). `seed`
    decides the draw of weighted mixtures only; the split is by content. Raises DataError for a file, row or length
    that the recipe doesn't let pass (``file:row: field: problem → mend``), TemplateError for a template that allows
    no exact targets.
    """
    make_encoder = partial(RowEncoder, section, tokenizer, kind, eos_for_text=eos_for_text)
    encoder = make_encoder()
    drop = section.on_bad_row == "drop"
    train = [_Source(source, read_source(source, keep_broken=drop)) for source in section.datasets]
    held_out = [_Source(source, read_source(source, keep_broken=drop)) for source in section.eval_datasets]
    key = tokens_key(
        tokenizer,
        kind=kind,
        section=section.model_dump(exclude={"num_proc", "packing"}),
        rows=[loaded.raw.sha256 for loaded in [*train, *held_out]],
        eos_for_text=eos_for_text,
    )
    folder = stored(key, lambda folder: _Pass(section, kind, encoder, make_encoder, folder).run(train, held_out))
    record = json.loads((folder / "record.json").read_text("utf-8"))
    accounts = [DataUsed(**account) for account in record["used"]]
    for account in accounts:
        if account.dropped:
            logger.warning(
                "%s: %d of %d rows left out: %s",
                account.path,
                sum(account.dropped.values()),
                account.rows,
                account.dropped,
            )
    rows = datasets.Dataset.from_file(str(folder / "train.arrow"))
    if section.datasets[0].weight is not None:
        weights = [source.weight for source in section.datasets]
        order = mixture(record["train_rows"], weights, seed=seed)
        starts = np.cumsum([0, *record["train_rows"]])
        rows = rows.select([int(starts[source]) + row for source, row in order])
    evaluation = folder / "eval.arrow"
    return Prepared(rows, datasets.Dataset.from_file(str(evaluation)) if evaluation.is_file() else None, accounts)


class _Pass:
    """One pass over all sources, in chunks, so that memory doesn't grow with the rows."""

    def __init__(self, section: DataSection, kind: Kind, encoder: RowEncoder, make_encoder: Any, folder: Path) -> None:
        self.section, self.kind, self.encoder = section, kind, encoder
        self.make_encoder = make_encoder
        self.folder = folder
        self.asked: set[str] = set()  # hashes of the prompts of eval_datasets
        self.pool: ProcessPoolExecutor | None = None
        self.workers = 1

    def run(self, train: list[_Source], held_out: list[_Source]) -> None:
        """Write ``train.arrow``, ``eval.arrow`` (where there are such rows) and ``record.json``."""
        section, schema = self.section, table_schema(self.kind)
        with ExitStack() as stack:
            files = [
                stack.enter_context(TableFile(self.folder / f"{side}.arrow", schema)) for side in ("train", "eval")
            ]
            self._start_pool(stack, sum(loaded.total for loaded in [*train, *held_out]))
            for loaded in held_out:
                self._encode(loaded, self._held_out(loaded), files)
            for loaded in train:
                before = files[0].rows
                self._encode(loaded, self._split(loaded), files)
                loaded.train_rows = files[0].rows - before
        for loaded in [*train, *held_out]:
            _check_account(loaded, section)
        if not files[0].rows:
            raise DataError(f"{_paths(section.datasets)}: no row is left to train on; see the counts: {_counts(train)}")
        if not files[1].rows and (section.eval_datasets or section.eval_fraction):
            raise DataError(f"{_paths(section.eval_datasets or section.datasets)}: no row is left to evaluate on")
        used = [loaded.account().model_dump() for loaded in [*train, *held_out]]
        write_json(self.folder / "record.json", {"train_rows": [loaded.train_rows for loaded in train], "used": used})

    def _start_pool(self, stack: ExitStack, rows: int) -> None:
        self.workers = min(self.section.num_proc or 1, -(-rows // _CHUNK))
        if self.workers < 2:
            return
        # Forked where that can be, as by datasets' own num_proc: no imports again, and what the encoder has learnt.
        # A worker tokenizes only; torch's threads, which don't survive a fork, are not asked for anything.
        method = "fork" if sys.platform == "linux" else "spawn"
        _worker[:] = [self.encoder]
        stack.callback(_worker.clear)
        pool = ProcessPoolExecutor(self.workers, get_context(method), _start_worker, (self.make_encoder,))
        stack.callback(pool.shutdown, cancel_futures=True)
        self.pool = pool

    def _rows(self, loaded: _Source) -> Iterator[tuple[str, Row]]:
        """A source's rows in the schema; bad rows raise DataError, or are counted where the recipe drops them."""
        source = loaded.source
        if loaded.raw.problems:
            loaded.dropped["broken JSON or CSV"] += len(loaded.raw.problems)
        format_ = None
        for where, columns in loaded.raw:
            try:
                format_ = format_ or format_of(source, columns, self.kind)
                yield where, normalise(columns, source, format_, self.kind)
            except BadRow as bad:
                if self.section.on_bad_row == "error":
                    raise DataError(f"{where}: {bad}") from None
                loaded.dropped[bad.reason] += 1
        loaded.format = format_ or str(source.format)

    def _held_out(self, loaded: _Source) -> Iterator[_Item]:
        for where, row in self._rows(loaded):
            self.asked.add(prompt_hash(row))
            yield _Item(where, row, evaluated=True)

    def _split(self, loaded: _Source) -> Iterator[_Item]:
        """Training rows and those split off; a row whose prompt is in ``eval_datasets`` is left out."""
        share = self.section.eval_fraction
        for where, row in self._rows(loaded):
            digest = prompt_hash(row) if self.asked or share else ""
            if digest and is_eval(digest, share):
                yield _Item(where, row, evaluated=True)
            elif digest in self.asked:
                loaded.dropped["its prompt is in eval_datasets"] += 1
            else:
                yield _Item(where, row, evaluated=False)

    def _encode(self, loaded: _Source, items: Iterator[_Item], files: Sequence[TableFile]) -> None:
        """Write the encoded rows of one source to their sides; those left out are counted in `loaded`."""
        for chunk, block in self._blocks(items):
            kept = [self._kept(loaded, item, outcome) for item, outcome in zip(chunk, block.outcomes, strict=True)]
            evaluated = np.repeat([item.evaluated for item in chunk], kept)
            for file, side in zip(files, (~evaluated, evaluated), strict=True):
                file.append(block.table if side.all() else block.table.filter(side))

    def _kept(self, loaded: _Source, item: _Item, outcome: int | BadRow | Dropped) -> int:
        if isinstance(outcome, int):
            loaded.used += 1
            return outcome
        if isinstance(outcome, BadRow):
            if self.section.on_bad_row == "error":
                raise DataError(f"{item.where}: {outcome}")
        else:
            if self.section.on_overlong == "error":
                raise DataError(f"{item.where}: {outcome.reason} → raise it, cut the row, or set data.on_overlong")
            loaded.lost_targets += outcome.lost_target
        loaded.dropped[outcome.reason] += 1
        return 0

    def _blocks(self, items: Iterator[_Item]) -> Iterator[tuple[list[_Item], Block]]:
        """The items in chunks with their encoding, in order; a few chunks ahead of the reader where there is a pool."""
        ahead: deque[tuple[list[_Item], Future[Block]]] = deque()
        for number, chunk in enumerate(iter(lambda: list(islice(items, _CHUNK)), [])):
            rows = [item.row for item in chunk]
            if self.pool is None or number == 0:  # the first here, so that forked workers start with its words
                yield chunk, self.encoder.block(rows)
                continue
            ahead.append((chunk, self.pool.submit(_encode_chunk, rows)))
            if len(ahead) > 4 * self.workers:
                done, future = ahead.popleft()
                yield done, future.result()
        for done, future in ahead:
            yield done, future.result()


_worker: list[RowEncoder] = []


def _start_worker(make_encoder: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if not _worker:
        _worker.append(make_encoder())


def _encode_chunk(rows: list[Row]) -> Block:
    return _worker[0].block(rows)


def _check_account(loaded: _Source, section: DataSection) -> None:
    if loaded.lost_targets > LOST_TARGETS_LIMIT * loaded.total:
        raise DataError(
            f"{loaded.source.path}: {loaded.lost_targets} of {loaded.total} rows have nothing left to learn within "
            f"data.max_length {section.max_length}; raise it, or leave long rows out with data.on_overlong: drop"
        )


def _paths(sources: Sequence[DatasetSource]) -> str:
    return ", ".join(source.path for source in sources)


def _counts(sources: Sequence[_Source]) -> str:
    total: Counter[str] = Counter()
    for loaded in sources:
        total.update(loaded.dropped)
    return "; ".join(f"{reason} ({count})" for reason, count in total.items()) or "every row went to evaluation"
