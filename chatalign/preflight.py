"""What ``chatalign check`` and ``chatalign inspect`` print, for a stage's recipe or a whole pipeline."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from chatalign.check import (
    DiskUse,
    Finding,
    LookedAt,
    data_sections,
    look_at_rows,
    place_findings,
    row_findings,
    start_findings,
    token_findings,
)
from chatalign.check.launch import Launch, default_config, launch_findings, launch_of_config
from chatalign.errors import ChatalignError
from chatalign.forked import end_with_parent
from chatalign.recipe import Recipe, load_pipeline, load_recipe, parse_overrides, read_yaml

_BYTES_BESIDE = 8 * 2**20  # of row files, above which they are read in a process beside the one that tokenizes
_SAMPLE = 2**20  # bytes of rows that are tokenized, over all recipes of a file
_COLOURS = {"ok": "green", "FAIL": "red", "note": "yellow"}


@dataclass(frozen=True)
class CheckReport:
    """What was looked at: in the file itself, and by recipe name with its stage."""

    path: str
    findings: list[Finding]
    recipes: dict[str, tuple[str, list[Finding]]]

    @property
    def counts(self) -> dict[str, int]:
        """How many findings are ok, FAIL and note."""
        every = [*self.findings, *(finding for _, findings in self.recipes.values() for finding in findings)]
        counted = Counter(finding.status for finding in every)
        return {"ok": counted["ok"], "FAIL": counted["FAIL"], "note": counted["note"]}

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints; the page on the guard says what each key holds."""
        return {
            "file": self.path,
            "findings": [finding.as_json() for finding in self.findings],
            "recipes": {
                name: {"stage": stage, "findings": [finding.as_json() for finding in findings]}
                for name, (stage, findings) in self.recipes.items()
            },
            "counts": self.counts,
        }


def load_any(path: str, overrides: Sequence[str]) -> dict[str, Recipe]:
    """The recipes in a file by name: one for a stage's recipe, all of a pipeline's."""
    from chatalign.pipeline import resolve_stages

    changes = parse_overrides(overrides)
    if "pipeline" in read_yaml(path):
        return resolve_stages(load_pipeline(path, changes), path)
    recipe = load_recipe(path, changes)
    return {recipe.stage: recipe}


def check_file(path: str, overrides: Sequence[str] = (), *, accelerate_config: str | None = None) -> CheckReport:
    """Look at everything that can be known of a recipe or pipeline before it trains; raises nothing of ours.

    `accelerate_config` is the file that it will be launched with; where none is given, accelerate's default one.
    """
    try:
        recipes = load_any(path, overrides)
        config = accelerate_config or default_config()
        launch = launch_of_config(config) if config else None
    except ChatalignError as error:
        return CheckReport(path, [Finding("recipe", path, error)], {})
    several = f"{len(recipes)} recipe{'s' if len(recipes) > 1 else ''}"
    read = Finding("recipe", f"{path}: {several} read, keys and values are right")
    found = _check_recipes(recipes, launch)
    return CheckReport(path, [read], {name: (recipes[name].stage, findings) for name, findings in found.items()})


def _check_recipes(recipes: Mapping[str, Recipe], launch: Launch | None) -> dict[str, list[Finding]]:
    earlier = {recipe.output_dir: recipe for recipe in recipes.values()} if len(recipes) > 1 else {}
    used = DiskUse()
    starts = {name: list(start_findings(recipe, frozenset(earlier))) for name, recipe in recipes.items()}
    with _rows_beside(list(recipes.values())) as looked_at:
        ready = {name for name, findings in starts.items() if all(finding.problem is None for finding in findings)}
        if isinstance(looked_at, dict):  # read already: rows that are wrong needn't wait for a tokenizer's import
            ready -= {name for name in ready if any(f.problem for f in row_findings(recipes[name], looked_at))}
        share = _SAMPLE // max(len(ready), 1)
        tokens = {
            name: list(token_findings(recipes[name], earlier, sample_bytes=share)) if name in ready else []
            for name in recipes
        }
        rows = looked_at if isinstance(looked_at, dict) else looked_at.result()
    found = {}
    for name, recipe in recipes.items():
        places = place_findings(recipe, earlier, used) if name in ready else ()
        launches = () if launch is None else launch_findings(recipe, launch)
        found[name] = [*starts[name], *row_findings(recipe, rows), *tokens[name], *places, *launches]
    return found


@contextmanager
def _rows_beside(recipes: Sequence[Recipe]) -> Iterator[LookedAt | Future[LookedAt]]:
    """What the rows hold; of large files as it comes from a process beside this one, which imports a tokenizer."""
    sources = [source for recipe in recipes for section, _ in data_sections(recipe) for source in section.datasets]
    files = {Path(source.path) for source in sources if Path(source.path).is_file()}
    if sum(file.stat().st_size for file in files) < _BYTES_BESIDE:
        yield look_at_rows(recipes)
        return
    # Forked before torch has threads, where that can be: nothing is imported again.
    with ProcessPoolExecutor(1, get_context("fork" if sys.platform == "linux" else "spawn"), end_with_parent) as beside:
        yield beside.submit(look_at_rows, recipes)


def print_check(
    path: str, overrides: Sequence[str], *, as_json: bool = False, accelerate_config: str | None = None
) -> int:
    """Print what was checked, pass or fail, with the mend; returns the exit status, 1 where something failed."""
    report = check_file(path, overrides, accelerate_config=accelerate_config)
    if as_json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
        return 1 if report.counts["FAIL"] else 0
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    for name, (stage, findings) in {"": ("", report.findings), **report.recipes}.items():
        if name:
            console.print(f"[bold]{escape(name)}[/] ({stage})")
        for finding in findings:
            mark = f"[{_COLOURS[finding.status]}]{finding.status:4}[/]"
            console.print(mark, escape(str(finding.problem or finding.note or finding.what)))
    failures, notes = report.counts["FAIL"], report.counts["note"]
    noted = f", {notes} note{'' if notes == 1 else 's'}" if notes else ""
    console.print(f"[bold]{failures} problem{'' if failures == 1 else 's'}[/]{noted}")
    return 1 if failures else 0


def print_rows(
    path: str,
    overrides: Sequence[str],
    *,
    rows: int | None = None,
    row: int | None = None,
    split: Literal["train", "eval"] = "train",
    stage: str | None = None,
    tokens: bool = False,
    html: str | None = None,
) -> None:
    """Show a stage's rows as tokens, here or as the HTML page `html`; of a pipeline those of `stage`.

    Raises RecipeError where the stage, the split or the row isn't there.
    """
    from rich.console import Console

    from chatalign.data import prepare
    from chatalign.models.load import load_tokenizer
    from chatalign.preview import MAX_ROWS, MAX_TOKENS, preview, print_preview, write_page
    from chatalign.preview.stage import stage_with_rows, tokenizer_section

    recipes = load_any(path, overrides)
    with_rows = [name for name, recipe in recipes.items() if recipe.stage != "eval" and data_sections(recipe)]
    name = stage_with_rows(recipes, with_rows, stage, path)
    recipe: Any = recipes[name]
    data, kind = data_sections(recipe)[0]
    tokenizer = load_tokenizer(tokenizer_section(recipe, recipes))
    shown = preview(
        prepare(data, tokenizer, kind, seed=recipe.train.seed),
        data,
        tokenizer,
        kind,
        title=f"{path} · {name}",
        split=split,
        count=min(rows or 20, MAX_ROWS) if html else rows or 3,
        row=row,
        most_tokens=MAX_TOKENS if html else None,
        batch_size=recipe.train.per_device_train_batch_size,
        pads=recipe.stage == "kto" or getattr(recipe, "engine", "native") == "trl",
    )
    if html is None:
        print_preview(shown, Console(), tokens=tokens, supervise=data.supervise)
    else:
        page = write_page(shown, html, supervise=data.supervise)
        print(f"{page}: {len(shown.rows)} of {shown.total} rows, {page.stat().st_size / 1000:,.0f} kB")
