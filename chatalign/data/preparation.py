"""From the recipe's ``data:`` section to tokenized datasets, with an account of every row that was left out."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import datasets

from chatalign.artifact import DataUsed
from chatalign.data.encode import Columns, RowEncoder
from chatalign.data.formats import format_of, normalise
from chatalign.data.lengths import Dropped
from chatalign.data.mixing import is_eval, mixture, prompt_hash
from chatalign.data.rows import BadRow, Kind, Row
from chatalign.data.sources import read_source
from chatalign.errors import DataError
from chatalign.recipe import DataSection, DatasetSource

logger = logging.getLogger(__name__)
LOST_TARGETS_LIMIT = 0.01  # a larger share of rows without targets is a mistake in max_length, not in the rows
_CHUNK = 1000


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
    sha256: str
    format: str
    total: int = 0
    rows: list[tuple[str, Row]] = field(default_factory=list)  # (file:row, row)
    dropped: Counter[str] = field(default_factory=Counter)
    lost_targets: int = 0
    used: int = 0

    def account(self) -> DataUsed:
        """The record for ``artifact.json``."""
        return DataUsed(
            path=self.source.path,
            sha256=self.sha256,
            format=self.format,
            rows=self.total,
            used=self.used,
            dropped=dict(sorted(self.dropped.items())),
        )


def prepare(section: DataSection, tokenizer: Any, kind: Kind, *, seed: int, eos_for_text: bool = True) -> Prepared:
    """Read, check, split, encode, cut to length and mix the rows of a ``data:`` section.

    `seed` decides the draw of weighted mixtures only; the split is by content. Raises DataError for a file, row or
    length that the recipe doesn't let pass (``file:row: field: problem → mend``), TemplateError for a template that
    allows no exact targets.
    """
    encoder = RowEncoder(section, tokenizer, kind, eos_for_text=eos_for_text)
    train = [load_rows(source, section, kind) for source in section.datasets]
    held_out = [load_rows(source, section, kind) for source in section.eval_datasets]
    splits = _split(train, held_out, section.eval_fraction)
    encoded = [[_encode(loaded, rows, encoder, section) for loaded, rows in side] for side in splits]
    for loaded in [*train, *held_out]:
        _check_account(loaded, section)
    order = mixture([len(rows) for rows in encoded[0]], [source.weight for source in section.datasets], seed=seed)
    if not order:
        raise DataError(f"{_paths(section.datasets)}: no row is left to train on; see the counts: {_counts(train)}")
    flat = encoder.dataset([row for rows in encoded[0] for row in rows])
    starts = _starts(encoded[0])
    weighted = section.datasets[0].weight is not None
    train_rows = flat.select([starts[source] + row for source, row in order]) if weighted else flat
    eval_rows = [row for rows in encoded[1] for row in rows]
    if not eval_rows and (section.eval_datasets or section.eval_fraction):
        raise DataError(f"{_paths(section.eval_datasets or section.datasets)}: no row is left to evaluate on")
    accounts = [loaded.account() for loaded in [*train, *held_out]]
    for account in accounts:
        if account.dropped:
            logger.warning(
                "%s: %d of %d rows left out: %s",
                account.path,
                sum(account.dropped.values()),
                account.rows,
                account.dropped,
            )
    return Prepared(train_rows, encoder.dataset(eval_rows) if eval_rows else None, accounts)


def load_rows(source: DatasetSource, section: DataSection, kind: Kind) -> _Source:
    """One source's rows in the schema; bad rows raise DataError, or are counted where the recipe drops them."""
    drop = section.on_bad_row == "drop"
    raw = read_source(source, keep_broken=drop)
    loaded = _Source(source=source, sha256=raw.sha256, format="", total=len(raw) + len(raw.problems))
    loaded.dropped.update({"broken JSON or CSV": len(raw.problems)} if raw.problems else {})
    format_ = None
    for where, columns in raw:
        try:
            format_ = format_ or format_of(source, columns, kind)
            loaded.rows.append((where, normalise(columns, source, format_, kind)))
        except BadRow as bad:
            if not drop:
                raise DataError(f"{where}: {bad}") from None
            loaded.dropped[bad.reason] += 1
    loaded.format = format_ or str(source.format)
    return loaded


_Side = list[tuple[_Source, list[tuple[str, Row]]]]


def _split(train: list[_Source], held_out: list[_Source], eval_fraction: float) -> tuple[_Side, _Side]:
    """Training and evaluation rows by source; a training row whose prompt is evaluated too is left out."""
    evaluation: _Side = [(loaded, loaded.rows) for loaded in held_out]
    asked = {prompt_hash(row) for loaded in held_out for _, row in loaded.rows}
    training: _Side = []
    for loaded in train:
        kept, split_off = [], []
        for where, row in loaded.rows:
            digest = prompt_hash(row) if asked or eval_fraction else ""
            if digest and is_eval(digest, eval_fraction):
                split_off.append((where, row))
            elif digest in asked:
                loaded.dropped["its prompt is in eval_datasets"] += 1
            else:
                kept.append((where, row))
        training.append((loaded, kept))
        if split_off:
            evaluation.append((loaded, split_off))
    return training, evaluation


def _encode(
    loaded: _Source, rows: list[tuple[str, Row]], encoder: RowEncoder, section: DataSection
) -> list[dict[str, Any]]:
    """The encoded rows of one source; those left out are counted in `loaded`."""
    made: list[dict[str, Any]] = []
    for (where, _), columns in zip(rows, _encoded([row for _, row in rows], encoder, section.num_proc), strict=True):
        if isinstance(columns, BadRow):
            if section.on_bad_row == "error":
                raise DataError(f"{where}: {columns}")
            loaded.dropped[columns.reason] += 1
        elif isinstance(columns, Dropped):
            if section.on_overlong == "error":
                raise DataError(f"{where}: {columns.reason} → raise it, cut the row, or set data.on_overlong")
            loaded.dropped[columns.reason] += 1
            loaded.lost_targets += columns.lost_target
        else:
            loaded.used += 1
            made += columns
    return made


def _encoded(rows: list[Row], encoder: RowEncoder, num_proc: int | None) -> Iterator[list[Columns] | BadRow | Dropped]:
    """The rows encoded in order, in chunks; in `num_proc` processes where asked for and worth starting."""
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    workers = min(num_proc or 1, len(chunks))
    if workers < 2:
        for chunk in chunks:
            yield from encoder.encode(chunk)
        return
    # Spawned, not forked: a fork of a process with torch's and tokenizers' threads can hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoder,)) as pool:
        for made in pool.map(_encode_chunk, chunks):
            yield from made


_worker: list[RowEncoder] = []


def _start_worker(encoder: RowEncoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker[:] = [encoder]


def _encode_chunk(rows: list[Row]) -> list[list[Columns] | BadRow | Dropped]:
    return _worker[0].encode(rows)


def _check_account(loaded: _Source, section: DataSection) -> None:
    if loaded.lost_targets > LOST_TARGETS_LIMIT * loaded.total:
        raise DataError(
            f"{loaded.source.path}: {loaded.lost_targets} of {loaded.total} rows have nothing left to learn within "
            f"data.max_length {section.max_length}; raise it, or leave long rows out with data.on_overlong: drop"
        )


def _starts(groups: Sequence[Sequence[Any]]) -> list[int]:
    starts, at = [], 0
    for group in groups:
        starts.append(at)
        at += len(group)
    return starts


def _paths(sources: Sequence[DatasetSource]) -> str:
    return ", ".join(source.path for source in sources)


def _counts(sources: Sequence[_Source]) -> str:
    total: Counter[str] = Counter()
    for loaded in sources:
        total.update(loaded.dropped)
    return "; ".join(f"{reason} ({count})" for reason, count in total.items()) or "every row went to evaluation"
