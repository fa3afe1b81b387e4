"""A preview as one HTML file of bounded size, without network or script; rows are text, whatever they hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from chatalign.errors import RecipeError
from chatalign.preview import words
from chatalign.preview.rows import Preview, ShownRow, Side
from chatalign.preview.statistics import Histogram, Statistics
from chatalign.preview.tokens import Piece, Segment, segments
from chatalign.report.page import render_page

MAX_ROWS, MAX_TOKENS = 200, 40_000  # a few MB
_WIDTH, _BASE, _TOP, _GAP = 720, 180, 28, 6  # of the chart, in its own units
_Values = dict[str, Any]


def write_page(preview: Preview, path: str | Path, *, supervise: str = "assistant") -> Path:
    """Write the page; raises RecipeError where the file can't be written."""
    path = Path(path)
    text = render_page("rows.html.j2", **_values(preview, supervise))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: can't be written ({error.strerror}); give `--html` another place") from None
    return path


def _values(preview: Preview, supervise: str) -> _Values:
    stats = preview.statistics
    histogram = stats.histogram
    return {
        "title": preview.title or "Rows as the model sees them",
        "split": preview.split,
        "total": f"{preview.total:,}",
        "rows_line": words.rows_line(preview),
        "limits": f"A page holds at most {MAX_ROWS} rows and {MAX_TOKENS:,} tokens of them.",
        "warning": words.strange_targets(preview, supervise),
        "chart": _chart(histogram),
        "limit_name": f"{histogram.limit_name} {histogram.limit:,}",
        "cut_line": words.cut_line(histogram),
        "is_cut": histogram.cut_rows > 0,
        "lengths": list(_lengths(stats)),
        "roles": list(_roles(stats)),
        "by_text": stats.by_text,
        "filling": stats.filling and words.filling_line(stats.filling),
        "sources": list(_sources(preview)),
        "rows": [_row(row) for row in preview.rows],
    }


def _chart(histogram: Histogram) -> _Values:
    """The bars' places, and the limit's line before the first bar that it cuts."""
    step = _WIDTH / len(histogram.bars)
    most = max(bar.rows for bar in histogram.bars)
    bars = []
    for i, bar in enumerate(histogram.bars):
        height = round((_BASE - _TOP) * bar.rows / most, 1)
        bars.append(
            {
                "x": round(i * step + _GAP / 2, 1),
                "y": round(_BASE - height, 1),
                "width": round(step - _GAP, 1),
                "height": height,
                "middle": round((i + 0.5) * step, 1),
                "rows": bar.rows,
                "range": f"{bar.first}–{bar.last}",
                "over": bar.cut,
            }
        )
    first_cut = next((i for i, bar in enumerate(histogram.bars) if bar.cut), None)
    limit_x = None if first_cut is None else round(first_cut * step, 1)
    return {"width": _WIDTH, "height": _BASE + 22, "base": _BASE, "bars": bars, "limit_x": limit_x}


def _lengths(stats: Statistics) -> Iterator[_Values]:
    for row in stats.lengths:
        cells = (row.rows, row.shortest, row.median, row.p95, row.longest, row.total)
        yield {"column": row.column, "cells": [f"{cell:,.10g}" for cell in cells]}


def _roles(stats: Statistics) -> Iterator[_Values]:
    counted = [(count.role, count.tokens, count.targets) for count in stats.roles]
    for role, tokens, targets in [*counted, ("all", stats.tokens, stats.targets)]:
        yield {
            "role": role,
            "tokens": f"{tokens:,}",
            "share": words.share(tokens, stats.tokens),
            "width": round(100 * tokens / max(stats.tokens, 1), 1),
            "targets": f"{targets:,}",
            "of_them": words.share(targets, tokens),
        }


def _sources(preview: Preview) -> Iterator[_Values]:
    for used in preview.used:
        yield {
            "path": used.path,
            "format": used.format,
            "rows": f"{used.rows:,}",
            "used": f"{used.used:,}",
            "drops": [
                {"count": f"{count:,}", "reason": segments(reason), "place": place}
                for count, reason, place in words.reasons(used)
            ],
        }


def _row(row: ShownRow) -> _Values:
    return {
        "number": row.number,
        "place": row.place,
        "tokens": f"{row.tokens:,}",
        "label": row.label,
        "cut": row.cut,
        "sides": [_side(side) for side in row.sides],
    }


def _side(side: Side) -> _Values:
    runs = [
        (target, list(map(_piece, group))) for target, group in groupby(side.pieces, key=lambda piece: piece.target)
    ]
    hidden = side.tokens - sum(len(piece.ids) for piece in side.pieces)
    return {"label": side.label, "runs": runs, "hidden": f"{hidden:,}" if hidden else ""}


def _piece(piece: Piece) -> _Values:
    ids = " ".join(map(str, piece.ids))
    name = "id" if len(piece.ids) == 1 else f"{len(piece.ids)} tokens, ids"
    return {
        "css": "special" if piece.special else "spelled" if piece.spelled else "",
        "tip": f"{name} {ids} · {piece.role} · {'target' if piece.target else 'context'}",
        "segments": _plain(piece.text) or segments(piece.text, spaces=True),
    }


def _plain(text: str) -> list[Segment]:
    """Nearly all tokens are a word behind a space."""
    word = text.removeprefix(" ")
    if not (word.isascii() and word.isalnum()):
        return []
    return [*([Segment("·", True)] if word != text else []), Segment(word, False)]
