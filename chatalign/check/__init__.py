"""Everything that can be known before training: ``chatalign check``, and what every launch refuses first.

No model is loaded here and no torch imported, except by :func:`tokenizer_finding`, which comes last.
"""

from __future__ import annotations

from collections.abc import Iterator

from chatalign.check.findings import STAGE_DATA, Finding, Kind, LookedAt
from chatalign.check.models import function_findings, model_findings, package_findings
from chatalign.check.place import output_finding
from chatalign.check.rows import data_sections, row_findings
from chatalign.check.tokens import tokenizer_finding
from chatalign.recipe import Recipe

__all__ = [
    "STAGE_DATA",
    "Finding",
    "Kind",
    "LookedAt",
    "check_recipe",
    "data_sections",
    "refuse_first",
    "tokenizer_finding",
]


def check_recipe(
    recipe: Recipe, *, made_later: frozenset[str] = frozenset(), looked_at: LookedAt | None = None
) -> Iterator[Finding]:
    """Check a validated recipe's packages, models, functions and rows, cheapest first.

    `made_later` holds folders that stages of the same pipeline will make. `looked_at` is given to all of them, so
    that rows which two stages read alike are read once.
    """
    yield from package_findings(recipe)
    yield from model_findings(recipe, made_later)
    yield from function_findings(recipe)
    yield output_finding(recipe)
    yield from row_findings(recipe, {} if looked_at is None else looked_at)


def refuse_first(
    recipe: Recipe, *, made_later: frozenset[str] = frozenset(), looked_at: LookedAt | None = None
) -> None:
    """Raise the first problem of :func:`check_recipe`."""
    for finding in check_recipe(recipe, made_later=made_later, looked_at=looked_at):
        if finding.problem is not None:
            raise finding.problem
