"""Where a run writes."""

from __future__ import annotations

from pathlib import Path

from chatalign.artifact import ARTIFACT_FILE
from chatalign.check.findings import Finding
from chatalign.errors import RecipeError
from chatalign.recipe import Recipe
from chatalign.runs import RUN_FILE


def output_finding(recipe: Recipe) -> Finding:
    """Whether `output_dir` is free or a chatalign run's."""
    folder = Path(recipe.output_dir)
    ours = not folder.exists() or not any(folder.iterdir()) or (folder / RUN_FILE).exists()
    ours = ours or (folder / ARTIFACT_FILE).exists()
    mend = f"`output_dir: {folder}` holds files that are no chatalign run; give another folder"
    return Finding(f"`output_dir`: {folder}", None if ours else RecipeError(mend))
