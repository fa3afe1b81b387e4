"""The schemas that ship are what the recipe classes say, so that a key can be refused without them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version

import pytest
from packaging.version import Version
from pydantic import BaseModel

from chatalign.recipe import STAGES, DatasetSource, ModelSection, PipelineRecipe, RewardFunction
from chatalign.recipe.schema import SCHEMA_NAMES, SCHEMAS, STAGE_NAMES, Keys, schema_text

CLASSES: dict[str, type[BaseModel]] = {**STAGES, "pipeline": PipelineRecipe}


@pytest.mark.skipif(Version(version("pydantic")) < Version("2.14"), reason="pydantic 2.14 writes those that ship")
@pytest.mark.parametrize("name", SCHEMA_NAMES)
def test_a_schema_is_what_its_class_says(name: str) -> None:
    schema = CLASSES[name].model_json_schema()
    if os.environ.get("CHATALIGN_RECORD"):
        (SCHEMAS / f"{name}.json").write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", "utf-8")
    assert json.loads(schema_text(name)) == schema
    assert schema["additionalProperties"] is False


def test_every_stage_has_a_schema_and_no_other_file_lies_there() -> None:
    assert list(STAGE_NAMES) == list(STAGES)
    assert {path.stem for path in SCHEMAS.iterdir()} == set(SCHEMA_NAMES)


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a class, by pydantic's own fields."""
    sections = {"datasets": DatasetSource, "eval_datasets": DatasetSource, "rewards": RewardFunction}
    for name, field in model.model_fields.items():
        yield prefix + name
        choices = (sections.get(name), field.annotation, *getattr(field.annotation, "__args__", ()))
        inner = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is not None and name not in ("models", "stages"):
            yield from keys_of(inner, f"{prefix}{name}.")


@pytest.mark.parametrize("name", SCHEMA_NAMES)
def test_known_keys_are_the_fields(name: str) -> None:
    assert Keys(name).known() == list(keys_of(CLASSES[name]))


def test_a_value_of_the_wrong_kind_is_left_to_the_class() -> None:
    raw = {"stage": "sft", "model": ["m"], "data": {"datasets": {"path": "x"}}, "train": None}
    assert Keys("sft").unknown(raw) == []
    (unknown,) = Keys("eval").unknown({"models": {"a": {"nam": "m"}}})
    assert unknown.dotted == "models.a.nam"
    assert unknown.siblings == [f"models.a.{key}" for key in ModelSection.model_fields]
