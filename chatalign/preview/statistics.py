"""What a table of prepared rows adds up to: lengths, cuts, tokens by role, how batches fill. No loop over rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from chatalign.data.packing import best_fit_decreasing, fill_rate
from chatalign.data.rows import Kind
from chatalign.preview.roles import ASSISTANT, OTHER, ROLES, TEMPLATE, TEXT, USER, RoleMarkers
from chatalign.recipe import DataSection

_ROWS_AT_ONCE = 4000  # a million tokens or so: few to hold
_LABELS = {"input_ids": "row"}
_BARS, _BARS_PAST_LIMIT = 8, 4
Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens a row in one column."""

    column: str
    rows: int
    shortest: int
    median: float
    p95: int
    longest: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Rows that have `first` to `last` tokens before any cut; `cut`: more than the recipe allows."""

    first: int
    last: int
    rows: int
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Lengths before any cut, of what `limit` holds: a document, or a prompt with its (longer) reply."""

    bars: list[Bar]
    limit: int
    limit_name: str
    cut_rows: int
    cut_tokens: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class RoleCount:
    """Tokens of one role, and how many of them are targets."""

    role: str
    tokens: int
    targets: int


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How batches fill. `padding`: the share of places that padding to a batch's longest row would take."""

    bins: int | None  # None: not packed
    capacity: int
    fill: float
    batch_size: int
    padding: float
    pads: bool  # whether the engine pads at all: ours lays rows end to end


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """All of the above for one table."""

    rows: int
    lengths: list[Lengths]
    histogram: Histogram
    roles: list[RoleCount]
    by_text: bool  # roles were found by plain text, which a row may hold too
    filling: Filling | None  # None: prompts are batched by the rollout

    @property
    def tokens(self) -> int:
        """Tokens of all roles."""
        return sum(count.tokens for count in self.roles)

    @property
    def targets(self) -> int:
        """Tokens that the model has to produce."""
        return sum(count.targets for count in self.roles)


def statistics(
    rows: datasets.Dataset,
    origin: datasets.Dataset,
    markers: RoleMarkers,
    section: DataSection,
    kind: Kind,
    *,
    batch_size: int,
    pads: bool,
) -> Statistics:
    """Add up a prepared table; `origin` says how long the same rows were before a cut."""
    columns = [name for name in rows.column_names if name.endswith("_ids")]
    lengths: dict[str, list[Numbers]] = {name: [] for name in columns}
    counts = np.zeros((len(ROLES), 2), dtype=np.int64)
    for table in rows.select_columns([*columns, *_marks(rows)]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for name in columns:
            ids, starts = _flat(table[name])
            lengths[name].append(np.diff(np.append(starts, len(ids))))
            targets = _flat(table["supervised"])[0] if name == "input_ids" else np.full(len(ids), name != "prompt_ids")
            roles = roles_of(ids, starts, targets, markers, kind=kind, column=name, supervise=section.supervise)
            counts += np.bincount(roles * 2 + (targets != 0), minlength=2 * len(ROLES)).reshape(-1, 2)
    by_column = {name: np.concatenate(parts) for name, parts in lengths.items()}
    whole = origin.with_format("arrow")[:]["full_length"].to_numpy().astype(np.int64)
    return Statistics(
        rows=len(rows),
        lengths=[_lengths(_LABELS.get(name, name.removesuffix("_ids")), by_column[name]) for name in columns],
        histogram=_histogram(_bounded(by_column), whole, section, kind),
        roles=[
            RoleCount(role=role, tokens=int(sum(counts[number])), targets=int(counts[number][1]))
            for number, role in enumerate(ROLES)
            if sum(counts[number])
        ],
        by_text=markers.by_text,
        filling=None if kind == "prompt" else _filling(by_column, section, kind, batch_size=batch_size, pads=pads),
    )


def roles_of(
    ids: NDArray[np.int32],
    starts: Numbers,
    targets: NDArray[Any],
    markers: RoleMarkers,
    *,
    kind: Kind,
    column: str,
    supervise: str,
) -> NDArray[np.int8]:
    """The role of each token of a column, int8 [T]; of rows that no template rendered by the mask."""
    if column not in ("input_ids", "prompt_ids"):
        return markers.roles(ids, starts, ASSISTANT)
    if markers.markers:
        return markers.roles(ids, starts, OTHER)
    if kind == "text" or (column == "input_ids" and supervise == "all"):
        return markers.roles(ids, starts, TEXT)
    roles = markers.roles(ids, starts, USER)
    roles[(targets != 0) & (roles != TEMPLATE)] = ASSISTANT
    return roles


def _marks(rows: datasets.Dataset) -> list[str]:
    return [name for name in rows.column_names if name == "supervised"]


def _flat(column: pyarrow.ChunkedArray) -> tuple[NDArray[Any], Numbers]:
    """A list column's values end to end, and where each row starts."""
    lists = column.combine_chunks()
    if isinstance(lists, pyarrow.ChunkedArray):  # older pyarrow keeps chunks here
        lists = pyarrow.concat_arrays(lists.chunks)
    lengths = pyarrow.compute.list_value_length(lists).to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return lists.flatten().to_numpy(), starts


def _lengths(column: str, lengths: Numbers) -> Lengths:
    ordered = np.sort(lengths)
    return Lengths(
        column=column,
        rows=len(ordered),
        shortest=int(ordered[0]),
        median=float(np.median(ordered)),
        p95=int(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]),
        longest=int(ordered[-1]),
        total=int(ordered.sum()),
    )


def _bounded(lengths: dict[str, Numbers]) -> Numbers:
    """Tokens a row of what ``max_length`` bounds."""
    if "chosen_ids" in lengths:
        return lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
    return np.sum(list(lengths.values()), axis=0)


def _histogram(now: Numbers, whole: Numbers, section: DataSection, kind: Kind) -> Histogram:
    by_prompt = kind == "prompt" and section.max_prompt_length is not None
    limit = section.max_prompt_length if by_prompt and section.max_prompt_length else section.max_length
    longest = int(whole.max())
    edges = np.array(list(_edges(longest, limit)))
    rows = np.diff(np.searchsorted(np.sort(whole), edges, side="right"))
    return Histogram(
        bars=[
            Bar(first=int(a) + 1, last=int(b), rows=int(n), cut=bool(a >= limit and kind != "text"))
            for a, b, n in zip(edges, edges[1:], rows, strict=False)
        ],
        limit=limit,
        limit_name="max_prompt_length" if by_prompt else "max_length",
        cut_rows=int((whole > now).sum()),
        cut_tokens=int((whole - now).sum()),
        longest=longest,
    )


def _edges(longest: int, limit: int) -> Iterator[int]:
    """Bars of one width, of which one ends at the limit where rows are longer; the last of all takes the rest."""
    within = min(longest, limit)
    width = -(-within // _BARS)
    if longest <= limit:
        yield from range(0, longest + width, width)
        return
    yield from sorted({round(i * limit / _BARS) for i in range(_BARS + 1)})
    past = list(range(limit + width, longest + width, width))
    yield from past if len(past) <= _BARS_PAST_LIMIT else [*past[: _BARS_PAST_LIMIT - 1], longest]


def _filling(lengths: dict[str, Numbers], section: DataSection, kind: Kind, *, batch_size: int, pads: bool) -> Filling:
    if "chosen_ids" in lengths:
        sequences = np.concatenate([lengths["prompt_ids"] + lengths[side] for side in ("chosen_ids", "rejected_ids")])
    else:
        sequences = _bounded(lengths)
    packed = section.packing and kind in ("conversation", "text")
    capacity = max(section.max_length, int(sequences.max()))
    bins: Sequence[Sequence[int]] = best_fit_decreasing(sequences, capacity) if packed else []  # type: ignore[arg-type]
    return Filling(
        bins=len(bins) if packed else None,
        capacity=capacity,
        fill=fill_rate(sequences, bins, capacity) if packed else 0.0,  # type: ignore[arg-type]
        batch_size=batch_size,
        padding=_padding(sequences, batch_size),
        pads=pads,
    )


def _padding(lengths: Numbers, batch_size: int) -> float:
    """The share of places that are padding where rows in a seeded order are padded to the longest of each batch."""
    order = np.random.default_rng(0).permutation(len(lengths))
    missing = -len(lengths) % batch_size
    batches = np.append(lengths[order], np.zeros(missing, dtype=np.int64)).reshape(-1, batch_size)
    rows = np.full(len(batches), batch_size)
    rows[-1] -= missing
    return 1 - float(lengths.sum() / (batches.max(axis=1) * rows).sum())
