"""What both forms of a preview say in words and numbers."""

from __future__ import annotations

from collections.abc import Iterator

from chatalign.artifact import DataUsed
from chatalign.preview.rows import Preview
from chatalign.preview.statistics import Filling, Histogram, Statistics

_REASONS = 20  # of a source; a reason may hold a row's own words, so that there may be as many as rows


def share(part: float, whole: float) -> str:
    """``12.5%``; a dash where there is nothing to share."""
    return f"{part / whole:.1%}" if whole else "–"


def counted(number: int, name: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def cut_line(histogram: Histogram) -> str:
    """What the length limit takes away."""
    limit = f"{histogram.limit_name} {histogram.limit:,}"
    if not histogram.cut_rows:
        return f"{limit}: no row is cut"
    cut = f"{counted(histogram.cut_rows, 'row')} cut, the longest of {histogram.longest:,} tokens"
    return f"{limit}: {cut}; {counted(histogram.cut_tokens, 'token')} lost"


def filling_line(filling: Filling) -> str:
    """How batches fill."""
    if filling.bins is not None:
        return f"packed, {counted(filling.bins, 'bin')} of {filling.capacity:,} tokens, {filling.fill:.1%} full"
    padded = f"padded to the longest of each batch of {filling.batch_size}, {filling.padding:.1%} of the places"
    if filling.pads:
        return f"not packed; {padded} are padding"
    return f"not packed; rows lie end to end without padding ({padded} would be empty)"


def summary_line(stats: Statistics) -> str:
    """The share of targets, and how batches fill."""
    if stats.filling is None:
        return "prompts, which the policy answers: no targets, and batched by the rollout"
    return f"{stats.targets / stats.tokens:.0%} of the tokens are targets; {filling_line(stats.filling)}"


def strange_targets(preview: Preview, supervise: str) -> str:
    """A warning where targets stand outside the assistant's turns and nobody asked for that; else empty."""
    outside = sum(
        count.targets for count in preview.statistics.roles if count.role not in ("assistant", "template", "text")
    )
    if not outside or supervise == "all":
        return ""
    return f"{counted(outside, 'target')} in turns that the template's markers give to others: look at the rows"


def rows_line(preview: Preview) -> str:
    """How many rows there are, in this split and the other."""
    here, other = ("train", "evaluate") if preview.split == "train" else ("evaluate", "train")
    return f"{counted(preview.total, 'row')} to {here} on, {preview.others:,} to {other} on"


def reasons(used: DataUsed) -> Iterator[tuple[int, str, str]]:
    """Why rows of a source were left out: how many, the reason, the first such row; the commonest first."""
    ordered = sorted(used.dropped.items(), key=lambda item: -item[1])
    for reason, count in ordered[:_REASONS]:
        yield count, reason[:300], next(iter(used.examples.get(reason, [])), "")
    if rest := ordered[_REASONS:]:
        yield sum(count for _, count in rest), f"for {counted(len(rest), 'other reason')}", ""
