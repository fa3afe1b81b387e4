"""A preview in the terminal. Colour is never the only sign: without it targets stand in ⟦ ⟧."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.bar import Bar as RichBar
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from chatalign.preview import words
from chatalign.preview.rows import Preview, ShownRow
from chatalign.preview.statistics import Histogram, Statistics
from chatalign.preview.tokens import Piece, segments

TARGET, CONTEXT, SPECIAL, SPELLED, SIGN = "green", "dim", "bold", "yellow", "magenta"
_OPEN, _CLOSE, _BOUND = "⟦", "⟧", "│"
_BRACKETS = _OPEN + _CLOSE + "⟨⟩"
_BAR_WIDTH = 40


def print_preview(preview: Preview, console: Console, *, tokens: bool = False, supervise: str = "assistant") -> None:
    """Print rows, then lengths, roles, how batches fill, and what was left out.

    Targets are green, context is dim, special tokens are bold, text that only spells one is yellow; what can't be
    seen has a sign (⏎, ⟨U+200B⟩). With `tokens` each token stands between bars, its id behind it.
    """
    brackets = console.color_system is None or console.no_color
    for row in preview.rows:
        console.rule(_head(row, preview.total), align="left")
        for side in row.sides:
            text = _by_token(side.pieces, brackets=brackets) if tokens else shown(side.pieces, brackets=brackets)
            _print(console, Text(f"{side.label}: ", style="cyan").append(text) if side.label else text)
        if row.label:
            _print(console, Text("label: ", style="cyan").append(row.label))
        if row.cut:
            _print(console, Text(row.cut, style="red"))
    stats = preview.statistics
    for part in (_lengths_table(stats), _histogram(stats.histogram), _roles_table(stats)):
        console.print(part)
    _print(console, Text(words.summary_line(stats)))
    if warning := words.strange_targets(preview, supervise):
        _print(console, Text(warning, style="red"))
    if stats.by_text:
        _print(console, Text("the template marks turns by plain text, so rows that hold such text count as it says"))
    console.print(_sources_table(preview))
    _print(console, Text(words.rows_line(preview)))


def shown(pieces: Sequence[Piece], *, brackets: bool = False) -> Text:
    """The pieces as they read, styled."""
    text = Text()
    before = False
    reserved = _BRACKETS if brackets else ""
    for (target, special, spelled), group in groupby(pieces, key=lambda piece: piece.look):
        if brackets and target != before:
            text.append(_OPEN if target else _CLOSE)
        before = target
        read = _visible("".join(piece.text for piece in group), _style(target, special, spelled), reserved)
        text.append(Text.assemble("⟨as text: ", read, "⟩") if spelled and brackets else read)
    return text.append(_CLOSE) if brackets and before else text


def _by_token(pieces: Sequence[Piece], *, brackets: bool) -> Text:
    """Each token between bars, with its id; tokens that share a character together."""
    text = Text()
    reserved = _BOUND + _BRACKETS if brackets else _BOUND
    for target, group in groupby(pieces, key=lambda piece: piece.target):
        if brackets and target:
            text.append(_OPEN)
        for piece in group:
            style = _style(piece.target, piece.special, piece.spelled)
            text.append(_BOUND, style=SIGN)
            text.append(_visible(piece.text, style, reserved, on_one_line=True))
            text.append(f" {'+'.join(map(str, piece.ids))}" + "\n" * piece.text.endswith("\n"), style=SIGN)
        if brackets and target:
            text.append(_CLOSE)
    return text


def _style(target: bool, special: bool, spelled: bool) -> str:
    style = TARGET if target else CONTEXT
    return f"{style} {SPECIAL}" if special else f"{style} {SPELLED}" if spelled else style


def _visible(piece: str, style: str, reserved: str = "", *, on_one_line: bool = False) -> Text:
    """The text with signs for what can't be seen, and for `reserved` characters, which must not pass for ours."""
    text = Text()
    for segment in segments(piece, spaces=on_one_line, also=reserved):
        shown_as = segment.text.replace("\n", "") if on_one_line else segment.text
        text.append(shown_as, style=f"{style} {SIGN}" if segment.sign and "U+" in segment.text else style)
    return text


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def _head(row: ShownRow, total: int) -> Text:
    return Text(f"row {row.number:,} of {total:,} · {row.place} · {row.tokens:,} tokens")


def _lengths_table(stats: Statistics) -> Table:
    table = Table("tokens", "rows", "min", "median", "p95", "max", "total", title="lengths", title_justify="left")
    for row in stats.lengths:
        cells = (row.rows, row.shortest, row.median, row.p95, row.longest, row.total)
        table.add_row(row.column, *(f"{cell:,.10g}" for cell in cells))
    return table


def _histogram(histogram: Histogram) -> Table:
    """Bars of lengths before any cut, and the line of the limit between those that it cuts and the others."""
    table = Table(title="tokens a row, before any cut", title_justify="left", box=None, padding=(0, 1))
    table.show_header = False
    most = max(bar.rows for bar in histogram.bars)
    past = False
    for bar in histogram.bars:
        if bar.cut and not past:
            table.add_row("", Text(f"── {histogram.limit_name} {histogram.limit:,} ──", style="red"), "")
        past = bar.cut
        drawn: RenderableType = RichBar(most, 0, bar.rows, width=_BAR_WIDTH, color="red" if bar.cut else "green")
        table.add_row(f"{bar.first:,}–{bar.last:,}", drawn, f"{bar.rows:,}" + (" cut" if bar.cut and bar.rows else ""))
    table.add_row("", Text(words.cut_line(histogram), style="red" if histogram.cut_rows else ""), "")
    return table


def _roles_table(stats: Statistics) -> Table:
    table = Table("role", "tokens", "share", "targets", "of them", title="tokens by role", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tokens, targets in _role_rows(stats):
        table.add_row(
            name, f"{tokens:,}", words.share(tokens, stats.tokens), f"{targets:,}", words.share(targets, tokens)
        )
    return table


def _role_rows(stats: Statistics) -> Iterator[tuple[str, int, int]]:
    yield from ((count.role, count.tokens, count.targets) for count in stats.roles)
    yield "all", stats.tokens, stats.targets


def _sources_table(preview: Preview) -> Table:
    table = Table("source", "format", "rows", "used", "left out", title="sources", title_justify="left")
    for used in preview.used:
        lines = []
        for count, reason, place in words.reasons(used):
            lines.append(f"{count:,} × {reason}" + (f" ({place})" if place else ""))
        # A reason may hold a row's words.
        left_out = Text("\n").join(_visible(line.replace("\n", " "), "") for line in lines) if lines else Text("none")
        table.add_row(Text(used.path), used.format, f"{used.rows:,}", f"{used.used:,}", left_out)
    return table
