"""From the recipe's ``data:`` section to tokenized datasets, with an account of every row that was left out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from chatalign.artifact import DataUsed, write_json
from chatalign.data.cleaning import Cleaner, LeftOut, check_clean, libraries
from chatalign.data.encode import ORIGIN, Outcome, RowEncoder, table_schema
from chatalign.data.files import Chunk
from chatalign.data.formats import format_of
from chatalign.data.leaks import PromptsWritten
from chatalign.data.mixing import Side, mixture, side_of
from chatalign.data.profiles import profile_task
from chatalign.data.rows import BadRow, Kind
from chatalign.data.sources import Rows, read_source
from chatalign.data.store import TableFile, stored, tokens_key
from chatalign.data.workers import Task, Workers, encode_task
from chatalign.errors import DataError
from chatalign.recipe import CleanSection, DataSection, DatasetSource
from chatalign.recipe.sections import Format

logger = logging.getLogger(__name__)
LOST_TARGETS_LIMIT = 0.01  # a larger share of rows without targets is a mistake in max_length, not in the rows
_CHUNK = 250  # rows encoded at once: enough for a tokenizer's batch, and few to hold
_EXAMPLES = 5  # rows named for each reason that rows are left out; the rest are counted


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows (columns by kind: see :mod:`chatalign.data.encode`) and what became of each source's rows.

    `train_origin` and `eval_origin` say of the same rows where they stand (``place``, file:row) and how many tokens
    they had before a cut (``full_length``).
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    used: list[DataUsed]
    train_origin: datasets.Dataset | None = None
    eval_origin: datasets.Dataset | None = None


@dataclass
class _Source:
    """One source while it is prepared."""

    source: DatasetSource
    raw: Rows
    format: Format | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lost_targets: int = 0
    used: int = 0
    train_rows: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)  # by file, what cleaning found

    @property
    def total(self) -> int:
        """Rows of the source, broken ones too."""
        return len(self.raw) + len(self.raw.problems)

    def drop(self, reason: str, place: str) -> None:
        """Count a row (``file:row``) that is left out; the first of each reason are named."""
        self.dropped[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < _EXAMPLES:
            named.append(place)

    def account(self) -> DataUsed:
        """The record for ``artifact.json``."""
        return DataUsed(
            path=self.source.path,
            sha256=self.raw.sha256,
            format=self.format or "",
            rows=self.total,
            used=self.used,
            dropped=dict(sorted(self.dropped.items())),
            examples=dict(sorted(self.examples.items())),
        )


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
        cleaned_by=libraries(section.clean),
    )
    total = sum(loaded.total for loaded in [*train, *held_out])

    def write(folder: Path) -> None:
        if section.clean:
            check_clean(section.clean, kind)  # before workers are forked, so that they have the models
        with Workers(min(section.num_proc or 1, -(-total // _CHUNK)), encoder, make_encoder) as workers:
            _Pass(section, kind, workers, folder).run(train, held_out)

    folder = stored(key, write)
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
    train_rows, train_origin = _apart(rows)
    if not (folder / "eval.arrow").is_file():
        return Prepared(train_rows, None, accounts, train_origin)
    eval_rows, eval_origin = _apart(datasets.Dataset.from_file(str(folder / "eval.arrow")))
    return Prepared(train_rows, eval_rows, accounts, train_origin, eval_origin)


def _apart(rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What training reads, and where it comes from."""
    return rows.remove_columns(list(ORIGIN)), rows.select_columns(list(ORIGIN))


class _Pass:
    """One pass over all sources, in chunks, so that memory doesn't grow with the rows."""

    def __init__(self, section: DataSection, kind: Kind, workers: Workers, folder: Path) -> None:
        self.section, self.kind, self.workers, self.folder = section, kind, workers, folder
        self.asked: set[str] = set()  # hashes of the prompts of eval_datasets
        self.written = PromptsWritten()

    def run(self, train: list[_Source], held_out: list[_Source]) -> None:
        """Write ``train.arrow``, ``eval.arrow`` (where there are such rows) and ``record.json``."""
        section, schema = self.section, table_schema(self.kind)
        if section.clean:
            self._clean(section.clean, train, held_out)
        with ExitStack() as stack:
            files = [
                stack.enter_context(TableFile(self.folder / f"{side}.arrow", schema)) for side in ("train", "eval")
            ]
            for loaded in held_out:
                self._encode(loaded, files, held_out=True)
            for loaded in train:
                before = files[0].rows
                self._encode(loaded, files)
                loaded.train_rows = files[0].rows - before
        for loaded in [*train, *held_out]:
            _check_account(loaded, section)
        if not files[0].rows:
            raise DataError(f"{_paths(section.datasets)}: no row is left to train on; see the counts: {_counts(train)}")
        if not files[1].rows and (section.eval_datasets or section.eval_fraction):
            raise DataError(f"{_paths(section.eval_datasets or section.datasets)}: no row is left to evaluate on")
        self.written.refuse_both_sides(_paths(section.datasets))
        used = [loaded.account().model_dump() for loaded in [*train, *held_out]]
        write_json(self.folder / "record.json", {"train_rows": [loaded.train_rows for loaded in train], "used": used})

    def _clean(self, clean: CleanSection, train: list[_Source], held_out: list[_Source]) -> None:
        """Look at all rows once, and tell each source which of its rows are left out."""
        with Cleaner(clean, rows=sum(len(loaded.raw) for loaded in train), folder=self.folder) as cleaner:
            for loaded in held_out:
                tasks = self._tasks(loaded, hashed=True, look=True)
                for profiles in self.workers.run(partial(profile_task, held_out=True), tasks):
                    self.asked.update(profiles.prompts)
                    cleaner.add_held_out(profiles)
            for number, loaded in enumerate(train):
                for profiles in self.workers.run(profile_task, self._tasks(loaded, self._split, look=True)):
                    cleaner.add(number, profiles, [self._side(digest) for digest in profiles.prompts])
            for number, name, left_out in cleaner.decide():
                train[number].left_out[name] = left_out

    @property
    def _split(self) -> bool:
        return bool(self.asked or self.section.eval_fraction)

    def _encode(self, loaded: _Source, files: Sequence[TableFile], *, held_out: bool = False) -> None:
        """Write the encoded rows of one source to their sides; those left out are counted in `loaded`."""
        for row in loaded.raw.problems:
            loaded.drop(row.broken.reason, row.place)
        for made in self.workers.run(encode_task, self._tasks(loaded, held_out or self._split)):
            if held_out:
                self.asked.update(filter(None, made.hashes))
            sides = [Side.EVAL if held_out else self._side(digest) for digest in made.hashes]
            for place, side, outcome in zip(made.places, sides, made.outcomes, strict=True):
                self._count(loaded, place, side, outcome)
            self.written.add(made.hashes, sides, [isinstance(outcome, int) for outcome in made.outcomes])
            side_of_row = np.repeat(sides, [outcome if isinstance(outcome, int) else 0 for outcome in made.outcomes])
            for file_side, file in zip((Side.TRAIN, Side.EVAL), files, strict=True):
                chosen = side_of_row == file_side
                file.append(made.table if chosen.all() else made.table.filter(chosen))

    def _tasks(self, loaded: _Source, hashed: bool, *, look: bool = False) -> Iterator[Task]:
        """A source's chunks; its format is that of the first row whose columns are known.

        `look`: all rows, before it is known which are cleaned away; nothing is counted.
        """
        format_ = loaded.format
        for chunk in loaded.raw.chunks(_CHUNK):
            format_ = format_ or self._format(loaded, chunk, look=look)
            if format_ is not None:
                loaded.format = format_
                yield Task(chunk if look else self._kept(loaded, chunk), loaded.source, format_, hashed)

    def _kept(self, loaded: _Source, chunk: Chunk) -> Chunk:
        """The chunk without rows that are cleaned away, which are counted."""
        if chunk.name not in loaded.left_out:
            return chunk
        numbered = list(chunk.numbered)
        left_out = loaded.left_out[chunk.name].between(numbered[0][0], numbered[-1][0])
        for number, reason in left_out.items():
            loaded.drop(reason, f"{chunk.name}:{number}")
        return replace(chunk, numbered=[(number, row) for number, row in numbered if number not in left_out])

    def _format(self, loaded: _Source, chunk: Chunk, *, look: bool) -> Format | None:
        """The format by the first row that has the mapped columns; where none has, they are counted as left out."""
        bad_rows: list[tuple[str, str]] = []
        for where, columns in chunk:
            try:
                return format_of(loaded.source, columns, self.kind, place=where)
            except BadRow as bad:
                if self.section.on_bad_row == "error":
                    raise DataError(f"{where}: {bad}") from None
                bad_rows.append((bad.reason, where))
        for reason, place in bad_rows if not look else ():
            loaded.drop(reason, place)
        return None

    def _side(self, digest: str) -> Side:
        return side_of(digest, eval_fraction=self.section.eval_fraction, asked=self.asked)

    def _count(self, loaded: _Source, place: str, side: Side, outcome: Outcome) -> None:
        """Put a row to the source's account, or raise DataError where the recipe doesn't let it pass."""
        if side == Side.NEITHER:
            loaded.drop("its prompt is in eval_datasets", place)
            return
        if isinstance(outcome, int):
            loaded.used += 1
            return
        if isinstance(outcome, BadRow):
            if self.section.on_bad_row == "error":
                raise DataError(f"{place}: {outcome}")
        else:
            if self.section.on_overlong == "error":
                raise DataError(f"{place}: {outcome.reason} → raise it, cut the row, or set data.on_overlong")
            loaded.lost_targets += outcome.lost_target
        loaded.drop(outcome.reason, place)


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
