"""Which stage's rows to show, and the tokenizer that they will be tokenized with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from chatalign.errors import RecipeError
from chatalign.recipe import ModelSection, Recipe


def stage_with_rows(recipes: Mapping[str, Recipe], with_rows: list[str], stage: str | None, path: str) -> str:
    """The name of the stage to show: `stage`, or the first of those that train on rows (`with_rows`).

    Raises RecipeError where there is no such stage, or it has no rows of its own.
    """
    if stage is not None and stage not in recipes:
        near = difflib.get_close_matches(stage, recipes, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(recipes)}"
        raise RecipeError(f"{path}: has no stage `{stage}`; {hint}")
    if stage is not None and stage not in with_rows:
        there = f"; these have: {', '.join(with_rows)}" if with_rows else ""
        raise RecipeError(f"{path}: stage `{stage}` has no training rows to inspect{there}")
    if not with_rows:
        raise RecipeError(f"{path}: a recipe without training rows has nothing to inspect; give a stage's that trains")
    return stage or with_rows[0]


def tokenizer_section(recipe: Recipe, recipes: Mapping[str, Recipe]) -> ModelSection:
    """Where a stage's tokenizer comes from, before any stage has run: back along the pipeline to a model that is there.

    Each stage saves the tokenizer that it was given, so the first one's is the last one's, but for its template.
    """
    section: ModelSection = recipe.model  # type: ignore[union-attr]
    maker = next((other for other in recipes.values() if other.output_dir == section.name_or_path), None)
    if maker is None or section.tokenizer_name_or_path:
        return section
    taken = getattr(maker, "pretrained", None) if not getattr(maker, "from_scratch", False) else None
    earlier = ModelSection(name_or_path=taken) if taken else tokenizer_section(maker, recipes)
    if section.chat_template_path:
        return earlier.model_copy(update={"chat_template_path": section.chat_template_path})
    return earlier
