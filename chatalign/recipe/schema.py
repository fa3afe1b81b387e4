"""A recipe's keys without its classes: the JSON Schemas in ``schemas/``, for editors and for refusing a misspelt key.

pydantic takes most of the time in which a recipe could be refused, and most refusals are of a key. The files are
what the classes say, and a test holds them to it: record them again by
``CHATALIGN_RECORD=1 python -m pytest tests/recipe``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

STAGE_NAMES = ("pretrain", "sft", "reward", "dpo", "ppo", "kto", "eval")
SCHEMA_NAMES = (*STAGE_NAMES, "pipeline")
SCHEMAS = Path(__file__).with_name("schemas")


def schema_text(name: str) -> str:
    """The JSON Schema of a stage's recipe, or of ``pipeline``."""
    return (SCHEMAS / f"{name}.json").read_text("utf-8")


class UnknownKey(NamedTuple):
    """A key that a recipe holds and its schema doesn't: dotted, with the dotted keys that its section knows."""

    dotted: str
    siblings: list[str]


class Keys:
    """The keys of one kind of recipe: a stage's name, or ``pipeline``."""

    def __init__(self, name: str) -> None:
        self._schema: Mapping[str, Any] = json.loads(schema_text(name))

    def known(self) -> list[str]:
        """Every dotted key; a section in a list goes by the list's key, without a number."""
        return list(self._known(self._schema, ""))

    def _known(self, schema: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, field in schema.get("properties", {}).items():
            yield prefix + name
            section = self._section(field)
            yield from self._known(self._section(section.get("items", section)), f"{prefix}{name}.")

    def unknown(self, raw: Mapping[str, Any]) -> list[UnknownKey]:
        """What `raw` holds beside the known keys; a value of the wrong kind is left to the recipe's class."""
        return list(self._unknown(raw, self._schema, ""))

    def _unknown(self, value: Any, schema: Mapping[str, Any], prefix: str) -> Iterator[UnknownKey]:
        schema = self._section(schema)
        if isinstance(value, list) and "items" in schema:
            for place, item in enumerate(value):
                yield from self._unknown(item, schema["items"], f"{prefix}{place}.")
        elif isinstance(value, Mapping) and schema.get("additionalProperties") is False:
            known = schema.get("properties", {})
            for key, inner in value.items():
                if key in known:
                    yield from self._unknown(inner, known[key], f"{prefix}{key}.")
                else:
                    yield UnknownKey(f"{prefix}{key}", [prefix + name for name in known])
        elif isinstance(value, Mapping) and isinstance(schema.get("additionalProperties"), Mapping):
            for key, inner in value.items():
                yield from self._unknown(inner, schema["additionalProperties"], f"{prefix}{key}.")

    def _section(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a schema refers to; of ``section or null``, the section."""
        for choice in schema.get("anyOf", [schema]):
            if "$ref" in choice:
                return self._schema["$defs"][choice["$ref"].removeprefix("#/$defs/")]
        return schema
