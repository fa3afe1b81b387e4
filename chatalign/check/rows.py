"""The rows of a recipe's data sections, read whole and not tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from chatalign.check.findings import STAGE_DATA, Finding, Kind, LookedAt
from chatalign.data.checks import DataLook, look_at_data
from chatalign.data.sources import looks_local
from chatalign.errors import DataError
from chatalign.recipe import DataSection, DatasetSource, Recipe


def row_findings(recipe: Recipe, looked_at: LookedAt) -> Iterator[Finding]:
    """Whether every local row can be trained on; what `looked_at` holds is not read again."""
    from chatalign.data import checks

    for section, kind in data_sections(recipe):
        what = f"rows of {', '.join(source.path for source in section.datasets)} as {kind}"
        if not _any_local(section):
            yield Finding("rows", f"{what}: on the Hub, not looked at before the run")
            continue
        alike = (section.model_dump_json(), kind)
        if alike not in looked_at:
            looked_at[alike] = DataLook(checks.check_data(section, kind))
        look = looked_at[alike]
        more = f" ({len(look.problems) - 1} more such problems)" if len(look.problems) > 1 else ""
        yield Finding("rows", what, DataError(look.problems[0] + more) if look.problems else None)
        if not look.problems and recipe.stage != "eval":
            yield from _counts(section, what, look)


def look_at_rows(recipes: Iterable[Recipe]) -> LookedAt:
    """Every local row that any of the recipes reads, once, with the counts that a launch has no time for."""
    looked_at: LookedAt = {}
    for recipe in recipes:
        for section, kind in data_sections(recipe):
            alike = (section.model_dump_json(), kind)
            if alike not in looked_at and _any_local(section):
                looked_at[alike] = look_at_data(section, kind)
    return looked_at


def _counts(section: DataSection, what: str, look: DataLook) -> Iterator[Finding]:
    """How many rows are there twice, and how many ask what evaluation rows ask."""
    if look.duplicates is not None:
        cleaned = section.clean is not None and section.clean.exact_duplicates
        share = f"{look.duplicates:,} of {look.rows:,} rows ({look.duplicates / max(look.rows, 1):.1%})"
        note = f"{what}: {share} are exact copies of an earlier one, and are learned that often"
        mend = "take them out, or set data.clean.exact_duplicates: true"
        said = f"{share} are exact copies, which data.clean leaves out" if cleaned else f"{look.rows:,}, no two alike"
        noted = look.duplicates and not cleaned
        yield Finding("duplicates", f"{what}: {said}", note=f"{note} → {mend}" if noted else None)
    if look.leaking is not None:
        names = ", ".join(source.path for source in section.eval_datasets)
        share = f"{look.leaking:,} of {look.rows:,} training rows ({look.leaking / max(look.rows, 1):.1%})"
        note = f"{what}: {share} ask what {names} asks; the stage leaves them out and counts them → nothing to mend"
        yield Finding("leakage", f"{what}: none asks what {names} asks", note=note if look.leaking else None)


def _any_local(section: DataSection) -> bool:
    return any(Path(source.path).exists() or looks_local(source.path) for source in section.datasets)


def data_sections(recipe: Recipe) -> list[tuple[DataSection, Kind]]:
    """Every source of rows in a recipe, with the kind of row that its stage reads."""
    sections: list[tuple[DataSection, Kind]] = []
    if recipe.stage == "pretrain" and getattr(recipe, "pretrained", None) and not getattr(recipe, "from_scratch", True):
        return sections  # the finished model is taken: its corpus need not be here
    if recipe.stage in STAGE_DATA:
        sections.append((recipe.data, STAGE_DATA[recipe.stage]))  # type: ignore[union-attr]
    if getattr(recipe, "ptx_data", None) is not None:
        sections.append((recipe.ptx_data, "text"))  # type: ignore[union-attr, arg-type]
    evaluation = getattr(recipe, "eval", None)
    parts: list[tuple[DatasetSource | None, Kind]] = []
    if evaluation is not None:
        parts = [(evaluation.prompts, "prompt"), (evaluation.pairs, "preference"), (evaluation.texts, "text")]
    sections += [(DataSection(datasets=[source]), kind) for source, kind in parts if source is not None]
    return sections
