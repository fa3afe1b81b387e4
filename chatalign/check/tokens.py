"""Rows as the model will see them. The one file of this package that imports torch, where a tokenizer is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from math import sqrt
from pathlib import Path
from typing import Any

from chatalign.check.findings import STAGE_DATA, Finding, Kind
from chatalign.check.rows import data_sections
from chatalign.check.stops import stop_findings
from chatalign.data.files import Chunk, is_data_file, uncounted
from chatalign.data.formats import format_of, normalise
from chatalign.data.rows import BadRow, Row
from chatalign.errors import ChatalignError, DataError
from chatalign.recipe import DataSection, DatasetSource, ModelSection, Recipe

SAMPLE_BYTES = 2**20  # of row files: a second or two of tokenizing
_BATCH = 250
_SURE = 3  # standard errors: what a sample shows so clearly is no accident of the draw


def tokenizer_finding(recipe: Recipe) -> Finding | None:
    """The first of :func:`token_findings` that fails, else the first; None where no tokenizer is on this machine."""
    findings = list(token_findings(recipe))
    failed = [finding for finding in findings if finding.problem is not None]
    return next(iter(failed or findings), None)


def token_findings(
    recipe: Recipe, earlier: Mapping[str, Recipe] | None = None, *, sample_bytes: int = SAMPLE_BYTES
) -> Iterator[Finding]:
    """Whether rows tokenize with exact targets, what `max_length` costs, and whether replies can end.

    `earlier` are the pipeline's stages by the folder that they will make: a model that isn't there yet has the
    tokenizer of the one that it is made from. Of more than about `sample_bytes` of rows every k-th is looked at.
    Nothing where the tokenizer isn't on this machine.
    """
    section = tokenizer_section(recipe, earlier or {})
    if section is None or recipe.stage not in STAGE_DATA or not (sections := data_sections(recipe)):
        return
    from chatalign.models.tokenizer import load_tokenizer

    name = section.tokenizer_name_or_path or section.name_or_path
    data, kind = sections[0]
    try:
        tokenizer = load_tokenizer(section)
    except ChatalignError as error:
        yield Finding("template", f"the tokenizer of {name}", error)
        return
    try:
        tokenized = [
            _tokenize(source, data, tokenizer, kind, sample_bytes) for source in data.datasets if _files(source)
        ]
    except ChatalignError as error:
        yield Finding("template", f"rows as {name} tokenizes them", error)
        return
    rows = sum(one.rows for one in tokenized)
    if rows:
        yield Finding("template", f"{rows:,} rows as {name} tokenizes them: {_HELD[kind]}")
        yield from (_lengths(one, data, kind) for one in tokenized if one.rows)
    yield from stop_findings(section, tokenizer, name=str(name), templated=kind != "text" and data.apply_chat_template)


_HELD: dict[Kind, str] = {
    "conversation": "targets decode to the replies, each with one stop token, after the prompt that serving shows",
    "preference": "both replies end in one stop token, after the same prompt, which serving shows too",
    "unpaired": "replies end in one stop token, after the prompt that serving shows",
    "prompt": "prompts end where a reply begins",
    "text": "documents end in EOS",
}


def tokenizer_section(recipe: Recipe, earlier: Mapping[str, Recipe]) -> ModelSection | None:
    """The model section whose tokenizer a recipe's rows go through, as a folder; None where it isn't here."""
    section = getattr(recipe, "model", None)
    seen: set[str] = set()
    while section is not None and not section.tokenizer_name_or_path and section.name_or_path in earlier:
        if Path(section.name_or_path, "artifact.json").is_file() or section.name_or_path in seen:
            break
        seen.add(section.name_or_path)
        section = _handed_on(section, getattr(earlier[section.name_or_path], "model", None))
    name = section and (section.tokenizer_name_or_path or section.name_or_path)
    if section is None or not name:
        return None
    if Path(name).exists():
        return section
    from chatalign.models.resolve import local_folder

    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return None
    cached = local_folder(name, section.revision)
    return None if cached is None else section.model_copy(update={"tokenizer_name_or_path": str(cached)})


def _handed_on(later: ModelSection, before: ModelSection | None) -> ModelSection | None:
    """An earlier stage's section, with the template that the later one puts in its place."""
    if before is None or not later.chat_template_path:
        return before
    return before.model_copy(update={"chat_template_path": later.chat_template_path})


@dataclass
class _Tokenized:
    """What became of one source's rows that were looked at, each `every`-th of them."""

    source: DatasetSource
    every: int
    rows: int = 0
    full_lengths: list[int] = field(default_factory=list)
    cut: int = 0
    left_out: int = 0
    lost_targets: int = 0

    @property
    def size(self) -> str:
        """How many rows were looked at, in words."""
        every = f" (1 in {self.every})" if self.every > 1 else ""
        return f"{self.rows:,} rows looked at{every}"


def _files(source: DatasetSource) -> list[Path]:
    """The row files of a source; none where it is on the Hub, or a folder that ``Dataset.save_to_disk`` wrote."""
    place = Path(source.path)
    if place.is_dir() and not any(place.glob("dataset_*.json")):
        return [path for path in sorted(place.rglob("*")) if path.is_file() and is_data_file(path)]
    return [place] if place.is_file() else []


def _tokenize(source: DatasetSource, data: DataSection, tokenizer: Any, kind: Kind, sample_bytes: int) -> _Tokenized:
    """Encode a source's rows, or a sample; those that are bad as rows are another check's.

    Raises TemplateError, or DataError for a row that the template refuses.
    """
    from chatalign.data.encode import RowEncoder

    made = _Tokenized(source, _every(source, sample_bytes))
    encoder = RowEncoder(data, tokenizer, kind)
    rows = _good_rows(source, made.every, kind)
    while batch := list(islice(rows, _BATCH)):
        _count(made, encoder, batch, data)
    return made


def _good_rows(source: DatasetSource, every: int, kind: Kind) -> Iterator[tuple[str, Row]]:
    """The rows to tokenize, each with its file:row, up to where a file breaks off: the check of the rows says so."""
    format_ = None
    try:
        for place, columns in _rows(source, every):
            try:
                format_ = format_ or format_of(source, columns, kind)
                row = normalise(columns, source, format_, kind)
            except BadRow:
                continue
            yield place, row
    except DataError:
        return


def _every(source: DatasetSource, sample_bytes: int) -> int:
    """1 where a source is looked at whole; k where every k-th row is about `sample_bytes`."""
    size = sum(path.stat().st_size * (4 if path.suffix == ".gz" else 1) for path in _files(source))
    every = max(-(-size // sample_bytes), 1)
    return every if source.max_rows is None else min(every, -(-source.max_rows // 1000))


def _rows(source: DatasetSource, every: int) -> Iterator[tuple[str, Any]]:
    parts = [uncounted(path) for path in _files(source)]
    if source.max_rows is not None:
        yield from islice(chain.from_iterable(parts), 0, source.max_rows, every)
        return
    for part in parts:
        yield from Chunk(part.name, islice(part.read(), 0, None, every), part.parse)


def _count(made: _Tokenized, encoder: Any, batch: list[tuple[str, Row]], data: DataSection) -> None:
    for (place, _), one in zip(batch, encoder.encode([row for _, row in batch]), strict=True):
        if isinstance(one, BadRow):
            if data.on_bad_row == "error":
                raise DataError(f"{place}: {one}")
            continue
        made.rows += 1
        if not isinstance(one, list):
            if data.on_overlong == "error":
                raise DataError(f"{place}: {one.reason} → raise it, cut the row, or set data.on_overlong")
            made.left_out += 1
            made.lost_targets += one.lost_target
            continue
        made.full_lengths += [columns["full_length"] for columns in one]
        made.cut += any(_length(columns) < columns["full_length"] for columns in one)


def _length(columns: Mapping[str, Any]) -> int:
    """A row's tokens as it is trained on; of a pair, those of the prompt and the longer reply."""
    if "input_ids" in columns:
        return len(columns["input_ids"])
    replies = [len(columns[name]) for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in columns]
    return len(columns["prompt_ids"]) + max(replies, default=0)


def _lengths(made: _Tokenized, data: DataSection, kind: Kind) -> Finding:
    """What `max_length` takes from the rows of a source."""
    limit = f"data.max_length {data.max_length}"
    what = f"lengths of {made.source.path}: {made.size}, none longer than {limit}"
    clearly = made.lost_targets - (_SURE * sqrt(made.lost_targets) if made.every > 1 else 0)
    if made.left_out == made.rows or clearly > _lost_limit() * made.rows:
        lost = made.lost_targets or made.left_out
        problem = f"{made.source.path}: {lost} of {made.size} have nothing left to learn within {limit}; raise it, "
        return Finding("lengths", what, DataError(problem + "or leave long rows out with data.on_overlong: drop"))
    if kind == "text" or not (made.cut or made.left_out):
        return Finding("lengths", what.replace("none longer", "no piece longer") if kind == "text" else what)
    note = f"{made.source.path}: of {made.size} {made.cut:,} are cut to {limit} and {made.left_out:,} left out"
    if made.lost_targets:
        note += f" ({made.lost_targets} with nothing to learn before the cut)"
    if made.full_lengths:
        whole = sorted(made.full_lengths)[min(int(0.99 * len(made.full_lengths)), len(made.full_lengths) - 1)]
        note += f" → data.max_length {whole} keeps 99 of 100 whole" if whole > data.max_length else ""
    return Finding("lengths", what, note=note)


def _lost_limit() -> float:
    from chatalign.data.preparation import LOST_TARGETS_LIMIT

    return LOST_TARGETS_LIMIT
