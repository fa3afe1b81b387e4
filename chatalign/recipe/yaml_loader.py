"""YAML as recipes are written in it: safe-loaded, with YAML 1.2's scalars, no key given twice.

Apart from :mod:`chatalign.recipe.load`, which imports it when it reads: ``chatalign schema`` reads no YAML.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml import YAMLError

__all__ = ["YAMLError", "parse_yaml"]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars (``1e-4`` is a number, ``no`` is a word) that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key_node.value}` is given twice; delete one", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises YAMLError, with the mark of the problem where it has one."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
