"""What can be known about the data before training, in seconds: no tokenizer, no torch, no network."""

from __future__ import annotations

from pathlib import Path

from chatalign.data.formats import format_of, normalise
from chatalign.data.mixing import is_eval, prompt_hash
from chatalign.data.rows import BadRow, Kind
from chatalign.data.sources import looks_local, missing_file, read_source
from chatalign.errors import DataError
from chatalign.recipe import DataSection, DatasetSource

SHOWN = 20  # bad rows named one by one for each source; the rest are counted


def check_data(section: DataSection, kind: Kind) -> list[str]:
    """Problems as lines ``file:row: field: problem → mend``; none means that every local row can be trained on.

    Reads every row of local files. Hub datasets are not fetched. With ``on_bad_row: drop`` bad rows are no
    problem, but a source without a good row is.
    """
    problems: list[str] = []
    train: list[str] = []
    held_out: list[str] = []
    split = bool(section.eval_fraction or section.eval_datasets)  # else nobody asks for the hashes: a fifth of the time
    for sources, hashes in ((section.datasets, train), (section.eval_datasets, held_out)):
        for source in sources:
            problems += _check_source(source, section, kind, hashes if split else None)
    remote = any(not Path(source.path).exists() for source in [*section.datasets, *section.eval_datasets])
    if problems or remote:
        return problems
    if section.eval_fraction:
        split_off = sum(is_eval(digest, section.eval_fraction) for digest in train)
        if split_off in (0, len(train)):
            side = "evaluation" if split_off == 0 else "training"
            problems.append(f"data.eval_fraction: {section.eval_fraction} of {len(train)} rows leaves none for {side}")
    if train and set(train) <= set(held_out):
        problems.append("data.eval_datasets: every training prompt is in it too → give rows that training doesn't see")
    return problems


def _check_source(source: DatasetSource, section: DataSection, kind: Kind, hashes: list[str] | None) -> list[str]:
    """The problems of one source; the prompt hashes of its good rows are added to `hashes`, where they are wanted."""
    if not Path(source.path).exists():
        return [missing_file(source.path)] if looks_local(source.path) else []
    try:
        rows = read_source(source, keep_broken=True)
    except DataError as error:
        return [str(error)]
    problems = [str(row) for row in rows.problems]
    format_ = None
    good = 0
    for where, columns in rows:
        try:
            format_ = format_ or format_of(source, columns, kind)
            row = normalise(columns, source, format_, kind)
            good += 1
        except BadRow as bad:
            problems.append(f"{where}: {bad}")
        except DataError as error:
            return [str(error)]
        else:
            if hashes is not None:
                hashes.append(prompt_hash(row))
    if section.on_bad_row == "drop":
        return [] if good else [f"{source.path}: not one of {len(rows)} rows is good; the first: {problems[0]}"]
    if len(problems) > SHOWN:
        more = len(problems) - SHOWN
        problems = [*problems[:SHOWN], f"{source.path}: {more} more bad rows → mend them, or data.on_bad_row: drop"]
    return problems
