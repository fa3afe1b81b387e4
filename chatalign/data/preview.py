"""``chatalign inspect``: the rows as the model will see them, and what became of the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chatalign.data.packing import best_fit_decreasing, fill_rate
from chatalign.data.preparation import Prepared, prepare
from chatalign.data.rows import Kind
from chatalign.recipe import DataSection

TARGET, CONTEXT, SPECIAL = "green", "dim", "bold"
_SIDES = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")


def inspect_rows(
    section: DataSection,
    tokenizer: Any,
    kind: Kind,
    rows: int = 3,
    *,
    seed: int = 0,
    console: Console | None = None,
) -> Prepared:
    """Prepare a ``data:`` section and print its first rows, their lengths, what was left out and how bins fill.

    Targets are green, context is dim, special tokens are bold; a new line shows as ⏎ before it breaks. Where the
    console has no colours (a file, a pipe), targets stand in ⟦ ⟧.
    """
    console = console or Console()
    brackets = console.color_system is None
    prepared = prepare(section, tokenizer, kind, seed=seed)
    for i, row in enumerate(prepared.train.select(range(min(rows, len(prepared.train))))):
        console.rule(f"row {i + 1} of {len(prepared.train)}", align="left")
        for label, text in _row_texts(row, tokenizer, brackets=brackets):
            console.print(Text(f"{label}: ", style="cyan").append(text) if label else text, soft_wrap=True)
    console.print(_lengths_table(prepared))
    if "supervised" in prepared.train.column_names:
        console.print(_fill_note(prepared, section))
    console.print(_sources_table(prepared))
    evaluation = 0 if prepared.eval is None else len(prepared.eval)
    console.print(f"{len(prepared.train)} rows to train on, {evaluation} to evaluate on")
    return prepared


def shown(ids: Sequence[int], targets: Sequence[int], tokenizer: Any, *, brackets: bool = False) -> Text:
    """The decoded tokens, styled; neighbours of one style are decoded together, so that characters stay whole."""
    special = set(tokenizer.all_special_ids) | {
        id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    marked = [(id_, bool(target), id_ in special) for id_, target in zip(ids, targets, strict=True)]
    text = Text()
    before = False
    for (target, is_special), group in groupby(marked, key=lambda token: token[1:]):
        piece = tokenizer.decode([id_ for id_, *_ in group], skip_special_tokens=False)
        style = f"{TARGET if target else CONTEXT} {SPECIAL}" if is_special else TARGET if target else CONTEXT
        if brackets and target != before:
            text.append("⟦" if target else "⟧")
        before = target
        text.append(piece.replace("\n", "⏎\n"), style=style)
    return text.append("⟧") if brackets and before else text


def _row_texts(row: dict[str, Any], tokenizer: Any, *, brackets: bool) -> list[tuple[str, Text]]:
    if "input_ids" in row:
        return [("", shown(row["input_ids"], row["supervised"], tokenizer, brackets=brackets))]
    texts = []
    for name in _SIDES:
        if name in row:
            targets = [int(name != "prompt_ids")] * len(row[name])
            texts.append((name.removesuffix("_ids"), shown(row[name], targets, tokenizer, brackets=brackets)))
    if "label" in row:
        texts.append(("label", Text("thumb up" if row["label"] else "thumb down")))
    return texts


def _lengths_table(prepared: Prepared) -> Table:
    table = Table("tokens", "rows", "min", "median", "p95", "max", "total", title="lengths", title_justify="left")
    for column in prepared.train.column_names:
        if not column.endswith("_ids"):
            continue
        lengths = sorted(len(ids) for ids in prepared.train[column])
        p95 = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
        cells = (len(lengths), lengths[0], f"{median(lengths):g}", p95, lengths[-1], f"{sum(lengths):,}")
        table.add_row(column.removesuffix("_ids"), *map(str, cells))
    return table


def _fill_note(prepared: Prepared, section: DataSection) -> str:
    lengths = [len(ids) for ids in prepared.train["input_ids"]]
    targets = sum(sum(marks) for marks in prepared.train["supervised"])
    bins = best_fit_decreasing(lengths, section.max_length)
    fill = fill_rate(lengths, bins, section.max_length)
    packed = f"packed, {len(bins)} bins of {section.max_length} tokens, {fill:.1%} full"
    return f"{targets / sum(lengths):.0%} of the tokens are targets; {packed}"


def _sources_table(prepared: Prepared) -> Table:
    table = Table("source", "format", "rows", "used", "left out", title="sources", title_justify="left")
    for used in prepared.used:
        left_out = "\n".join(f"{count} × {reason}" for reason, count in used.dropped.items()) or "none"
        table.add_row(used.path, used.format, str(used.rows), str(used.used), left_out)
    return table
