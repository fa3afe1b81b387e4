"""Rows as the model will see them. The one place of this package that imports torch, where a tokenizer is there."""

from __future__ import annotations

from pathlib import Path

from chatalign.check.findings import STAGE_DATA, Finding
from chatalign.check.rows import data_sections
from chatalign.errors import ChatalignError
from chatalign.recipe import Recipe


def tokenizer_finding(recipe: Recipe) -> Finding | None:
    """Whether the first rows tokenize with an exact mask; None where the tokenizer isn't on this machine."""
    section = getattr(recipe, "model", None)
    name = getattr(section, "tokenizer_name_or_path", None) or getattr(section, "name_or_path", None)
    if section is None or not name or not Path(name).exists() or recipe.stage not in STAGE_DATA:
        return None
    from chatalign.data import prepare
    from chatalign.models.load import load_tokenizer

    what = f"the first rows as {name} tokenizes them"
    if not data_sections(recipe):
        return None
    data, kind = data_sections(recipe)[0]
    few = [source.model_copy(update={"max_rows": min(source.max_rows or 64, 64)}) for source in data.datasets]
    try:
        # Of so few rows no share can be judged: neither eval_fraction's nor that of rows cut by max_length.
        update = {"datasets": few, "eval_datasets": [], "eval_fraction": 0.0, "max_length": 1 << 20}
        prepare(data.model_copy(update=update), load_tokenizer(section), kind, seed=0)
    except ChatalignError as error:
        return Finding(what, error)
    return Finding(what)
