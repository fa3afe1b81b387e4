"""Everything that can be known before training: ``chatalign check``, and what every launch refuses first.

No model is loaded here and no torch imported, except by :func:`token_findings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from chatalign.check.findings import STAGE_DATA, Finding, Kind, LookedAt
from chatalign.check.identity import identity_findings
from chatalign.check.models import function_findings, model_findings, package_findings
from chatalign.check.place import DiskUse, checkpoint_findings, disk_finding, output_finding
from chatalign.check.rows import data_sections, look_at_rows, row_findings
from chatalign.check.tokens import token_findings, tokenizer_finding
from chatalign.recipe import Recipe

__all__ = [
    "STAGE_DATA",
    "DiskUse",
    "Finding",
    "Kind",
    "LookedAt",
    "check_recipe",
    "data_sections",
    "look_at_rows",
    "place_findings",
    "refuse_first",
    "row_findings",
    "start_findings",
    "token_findings",
    "tokenizer_finding",
]


def check_recipe(
    recipe: Recipe, *, made_later: frozenset[str] = frozenset(), looked_at: LookedAt | None = None
) -> Iterator[Finding]:
    """What a launch looks at: a validated recipe's packages, models, functions, folder and rows, cheapest first.

    `made_later` holds folders that stages of the same pipeline will make. `looked_at` is given to all of them, so
    that rows which two stages read alike are read once.
    """
    yield from start_findings(recipe, made_later)
    yield from row_findings(recipe, {} if looked_at is None else looked_at)


def start_findings(recipe: Recipe, made_later: frozenset[str] = frozenset()) -> Iterator[Finding]:
    """What has to be there for a recipe to start: packages, models, functions, a folder of its own."""
    yield from package_findings(recipe)
    yield from model_findings(recipe, made_later)
    yield from function_findings(recipe)
    yield output_finding(recipe)


def place_findings(recipe: Recipe, earlier: Mapping[str, Recipe], used: DiskUse) -> Iterator[Finding]:
    """Whose models and checkpoints these are, and whether the disk has room; beyond what a launch looks at."""
    yield from identity_findings(recipe, earlier)
    yield from checkpoint_findings(recipe, earlier)
    if (disk := disk_finding(recipe, earlier, used)) is not None:
        yield disk


def refuse_first(
    recipe: Recipe, *, made_later: frozenset[str] = frozenset(), looked_at: LookedAt | None = None
) -> None:
    """Raise the first problem of :func:`check_recipe`."""
    for finding in check_recipe(recipe, made_later=made_later, looked_at=looked_at):
        if finding.problem is not None:
            raise finding.problem
