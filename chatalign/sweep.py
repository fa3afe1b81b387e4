"""``chatalign run PIPELINE --sweep dpo.beta=0.05,0.1``: a pipeline for each value; stages that all share run once.

What the swept keys don't touch runs in the pipeline's own folder; the rest runs in ``sweep/LABEL`` below it, where
links stand for the shared stages, so that each folder is a pipeline's with a report of its own.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatalign.artifact import write_json
from chatalign.errors import RecipeError
from chatalign.launch import say
from chatalign.pipeline import inputs_of, resolve_stages, run_pipeline
from chatalign.recipe import STAGES, PipelineRecipe, load_pipeline, read_yaml
from chatalign.recipe.yaml_loader import YAMLError, parse_yaml
from chatalign.report.headline import cell, eval_columns, headline
from chatalign.report.markdown import markdown_table

SWEEP_FOLDER = "sweep"
Values = Mapping[str, Any]  # dotted key, beginning with a stage's name → one of its values


def parse_sweeps(items: Iterable[str]) -> dict[str, list[Any]]:
    """``["dpo.beta=0.05,0.1"]`` → ``{"dpo.beta": [0.05, 0.1]}``; values are read as a YAML list."""
    swept: dict[str, list[Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        try:
            values = parse_yaml(f"[{text}]") if equals else None
        except YAMLError:
            values = None
        if not key or not isinstance(values, list) or not values:
            raise RecipeError(f"--sweep {item}: write it like dpo.beta=0.05,0.1,0.2")
        if key in swept:
            raise RecipeError(f"--sweep {item}: `{key}` is swept twice; give all its values at once")
        swept[key] = values
    return swept


def run_sweep(
    path: str | Path, overrides: Mapping[str, Any], swept: Mapping[str, Sequence[Any]], **how: Any
) -> list[dict[str, Any]]:
    """Run a pipeline for every combination of values; returns their summaries, in order.

    `how` goes to :func:`pipeline.run_pipeline`. Raises RecipeError for a key that begins with no stage's name, or
    for one that some stage refuses, before anything runs.
    """
    pipeline = load_pipeline(path, overrides)
    swept = {_full_key(pipeline, path, key): values for key, values in swept.items()}
    variants = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    home = Path(pipeline.output_dir)
    folders = [home / SWEEP_FOLDER / label_of(values) for values in variants]
    if len(set(folders)) < len(folders):
        raise RecipeError("--sweep: two values are the same; give each once")
    for values in variants:
        resolve_stages(load_pipeline(path, {**overrides, **values}), path)  # refused now, not after hours
    touched = _touched(pipeline, {key.partition(".")[0] for key in swept})
    shared = [name for name in pipeline.stages if name not in touched]
    if shared:
        run_pipeline(path, overrides, only=shared, **how)
    summaries = []
    for number, (values, folder) in enumerate(zip(variants, folders, strict=True), start=1):
        say(f"sweep {number}/{len(variants)}: {', '.join(f'{key}={value}' for key, value in values.items())}")
        _link(home, folder, shared)
        summaries.append(run_pipeline(path, {**overrides, **values, "output_dir": str(folder)}, **how))
    _report(home / SWEEP_FOLDER, pipeline, touched, variants, summaries)
    return summaries


def label_of(values: Values) -> str:
    """A folder's name for a combination of values."""
    parts = (f"{key}={value}" for key, value in values.items())
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(parts))


def _full_key(pipeline: PipelineRecipe, path: str | Path, key: str) -> str:
    """``dpo.beta`` of a stage ``dpo`` is short for ``dpo.dpo.beta``, the section of the stage's kind."""
    name, _, rest = key.partition(".")
    if name not in pipeline.stages or not rest:
        raise RecipeError(f"--sweep {key}: begin with a stage's name ({', '.join(pipeline.stages)}), as in dpo.beta")
    raw = read_yaml(Path(path).parent / pipeline.stages[name].recipe)
    kind = str(raw.get("stage"))
    fields = STAGES[kind].model_fields if kind in STAGES else {}
    section = getattr(fields.get(kind), "annotation", None)
    first = rest.partition(".")[0]
    if first not in fields and first in getattr(section, "model_fields", {}):
        return f"{name}.{kind}.{rest}"
    return key


def _touched(pipeline: PipelineRecipe, changed: set[str]) -> set[str]:
    """The stages that are changed, and all that take something from them."""
    touched = set(changed)
    for name in pipeline.stages:  # inputs come before what takes them
        if touched & inputs_of(pipeline, name):
            touched.add(name)
    return touched


def _link(home: Path, folder: Path, shared: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in shared:
        link = folder / name
        if not link.is_symlink() and not link.exists():
            link.symlink_to(os.path.relpath(home / name, folder))


def _report(
    folder: Path,
    pipeline: PipelineRecipe,
    touched: set[str],
    variants: Sequence[Values],
    summaries: Sequence[Mapping[str, Any]],
) -> None:
    """``sweep.json`` and ``sweep.md``: what came of each combination, beside the others."""
    rows = [
        {"values": dict(values), "stages": summary["stages"], "eval": summary["eval"]}
        for values, summary in zip(variants, summaries, strict=True)
    ]
    write_json(folder / "sweep.json", rows)
    results = markdown_table(("", "stage", "result"), _stage_rows(touched, variants, summaries))
    parts = [f"# {pipeline.pipeline}: sweep", results, *_evaluations(touched, variants, summaries)]
    (folder / "sweep.md").write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")
    say(f"{folder / 'sweep.md'}")


def _stage_rows(
    touched: set[str], variants: Sequence[Values], summaries: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, str]]:
    for values, summary in zip(variants, summaries, strict=True):
        for stage in summary["stages"]:
            if stage["name"] in touched and stage["stage"] != "eval":
                yield label_of(values), stage["name"], headline(stage["stage"], stage["metrics"])


def _evaluations(
    touched: set[str], variants: Sequence[Values], summaries: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """A table a model, with a row for each combination; models that no combination changes are left out."""
    for model in dict.fromkeys(name for summary in summaries for name in summary["eval"] if name in touched):
        found = {label_of(v): s["eval"][model] for v, s in zip(variants, summaries, strict=True) if model in s["eval"]}
        columns = eval_columns(found)
        rows = [(label, *(cell(column, row) for column in columns)) for label, row in found.items()]
        yield markdown_table((model, *(column.heading for column in columns)), rows)
