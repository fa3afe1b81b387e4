"""Every recipe that ships is a test: it loads, its resolved form is the recorded one, and no key repeats a default.

A changed default shows in the diff of tests/golden/recipes. Record again, with a reason in the CHANGELOG, by
``CHATALIGN_RECORD=1 python -m pytest tests/recipe``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from chatalign.pipeline import resolve_stages
from chatalign.recipe import STAGES, PipelineRecipe, load_pipeline, load_recipe, read_yaml

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "recipes"
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))
FILLED_BY_PIPELINE = {"reward_model": {"name_or_path": "made/earlier"}}


def is_pipeline(path: str) -> bool:
    return "pipeline" in read_yaml(ROOT / path)


@pytest.mark.parametrize("path", RECIPES)
def test_resolved_form_is_the_recorded_one(path: str) -> None:
    if is_pipeline(path):
        recipe: Any = load_pipeline(ROOT / path)
        resolved = {
            "pipeline": recipe.model_dump(mode="json"),
            "stages": {name: r.model_dump(mode="json") for name, r in resolve_stages(recipe, ROOT / path).items()},
        }
    else:
        extra = FILLED_BY_PIPELINE if read_yaml(ROOT / path)["stage"] == "ppo" else {}
        given = read_yaml(ROOT / path)
        resolved = load_recipe(ROOT / path, {k: v for k, v in extra.items() if k not in given}).model_dump(mode="json")
    golden = GOLDEN / path.removeprefix("recipes/").replace("/", "--").replace(".yaml", ".json")
    if os.environ.get("CHATALIGN_RECORD"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(json.dumps(resolved, indent=1, ensure_ascii=False) + "\n", "utf-8")
    assert resolved == json.loads(golden.read_text("utf-8"))


def repeated_defaults(model: type[BaseModel], raw: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in raw.items():
        field = model.model_fields[key]
        if isinstance(value, dict) and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from repeated_defaults(field.annotation, value, f"{prefix}{key}.")
        elif not field.is_required() and value == field.get_default(call_default_factory=True):
            yield prefix + key


@pytest.mark.parametrize("path", RECIPES)
def test_sets_no_key_to_its_default(path: str) -> None:
    raw = read_yaml(ROOT / path)
    model = PipelineRecipe if is_pipeline(path) else STAGES[raw["stage"]]
    assert list(repeated_defaults(model, raw)) == []


def test_no_recorded_form_is_left_over() -> None:
    names = {path.removeprefix("recipes/").replace("/", "--").replace(".yaml", ".json") for path in RECIPES}
    assert {path.name for path in GOLDEN.glob("*.json")} == names
