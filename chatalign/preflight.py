"""What ``chatalign check`` and ``chatalign inspect`` print, for a stage's recipe or a whole pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from chatalign.check import Finding, LookedAt, check_recipe, data_sections, tokenizer_finding
from chatalign.errors import ChatalignError, RecipeError
from chatalign.recipe import Recipe, load_pipeline, load_recipe, parse_overrides, read_yaml


def load_any(path: str, overrides: Sequence[str]) -> dict[str, Recipe]:
    """The recipes in a file by name: one for a stage's recipe, all of a pipeline's."""
    from chatalign.pipeline import resolve_stages

    changes = parse_overrides(overrides)
    if "pipeline" in read_yaml(path):
        return resolve_stages(load_pipeline(path, changes), path)
    recipe = load_recipe(path, changes)
    return {recipe.stage: recipe}


def print_check(path: str, overrides: Sequence[str]) -> int:
    """Print what was checked, pass or fail, with the mend; returns the exit status, 1 where something failed."""
    console = Console(soft_wrap=True, highlight=False)
    failures = 0

    def show(finding: Finding) -> None:
        nonlocal failures
        failures += finding.problem is not None
        mark = "[green]ok[/]  " if finding.problem is None else "[red]FAIL[/]"
        console.print(mark, finding.what if finding.problem is None else str(finding.problem), markup=True)

    try:
        recipes = load_any(path, overrides)
    except ChatalignError as error:
        show(Finding(path, error))
        return 1
    show(Finding(f"{path}: {len(recipes)} recipe{'s' if len(recipes) > 1 else ''} read, keys and values are right"))
    made_later = frozenset(recipe.output_dir for recipe in recipes.values()) if len(recipes) > 1 else frozenset()
    looked_at: LookedAt = {}
    for name, recipe in recipes.items():
        console.print(f"[bold]{name}[/] ({recipe.stage})")
        findings = list(check_recipe(recipe, made_later=made_later, looked_at=looked_at))
        if all(finding.problem is None for finding in findings) and (last := tokenizer_finding(recipe)):
            findings.append(last)
        for finding in findings:
            show(finding)
    console.print(f"[bold]{failures} problem{'' if failures == 1 else 's'}[/]")
    return 1 if failures else 0


def print_rows(path: str, overrides: Sequence[str], rows: int) -> None:
    """Show a stage's rows as tokens, supervised ones coloured; raises RecipeError for a pipeline."""
    from chatalign.data.preview import inspect_rows
    from chatalign.models.load import load_tokenizer

    recipe = load_recipe(path, parse_overrides(overrides))
    sections = data_sections(recipe)
    if not sections or recipe.stage == "eval":
        raise RecipeError(f"{path}: a {recipe.stage} recipe without training rows has nothing to inspect")
    data, kind = sections[0]
    inspect_rows(data, load_tokenizer(recipe.model), kind, rows)
