"""The rows of a recipe's data sections, read whole and not tokenized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatalign.check.findings import STAGE_DATA, Finding, Kind, LookedAt
from chatalign.errors import DataError
from chatalign.recipe import DataSection, DatasetSource, Recipe


def row_findings(recipe: Recipe, looked_at: LookedAt) -> Iterator[Finding]:
    """Whether every local row can be trained on; what `looked_at` holds is not read again."""
    from chatalign.data.checks import check_data
    from chatalign.data.sources import looks_local

    for section, kind in data_sections(recipe):
        names = ", ".join(source.path for source in section.datasets)
        if not any(Path(source.path).exists() or looks_local(source.path) for source in section.datasets):
            yield Finding(f"rows of {names} as {kind}: on the Hub, not looked at before the run")
            continue
        alike = (section.model_dump_json(), kind)
        if alike not in looked_at:
            looked_at[alike] = check_data(section, kind)
        problems = looked_at[alike]
        more = f" ({len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        yield Finding(f"rows of {names} as {kind}", DataError(problems[0] + more) if problems else None)


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
