"""The gold function of a recipe: ``path/to/file.py:name``, trusted code that scores one reply exactly.

Called as ``f(*, messages, reply, row, ended)``, it gives a number, or a mapping with ``gold`` and any further
numbers, of which ``correct`` and ``format`` become the report's accuracy and format_rate.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chatalign.errors import NonFiniteError, RecipeError

GoldFunction = Callable[..., Any]


def load_gold(reference: str) -> GoldFunction:
    """The function that ``path/to/file.py:name`` names; raises RecipeError where file or name is missing."""
    path_text, _, name = reference.rpartition(":")
    path = Path(path_text)
    if not path.is_file() or path.suffix != ".py":
        raise RecipeError(f"`eval.gold: {reference}`: {path_text or reference} is no Python file; give file.py:name")
    spec = importlib.util.spec_from_file_location(f"chatalign_gold_{path.stem}", path)
    assert spec is not None  # for a .py file there is always a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"`eval.gold: {reference}`: {path_text} has no function `{name}`")
    return function


def gold_scores(
    function: GoldFunction, reference: str, *, messages: Any, reply: str, row: Mapping[str, Any], ended: bool
) -> dict[str, float]:
    """The numbers of one reply, ``gold`` among them.

    Raises RecipeError where the function gives something else, NonFiniteError where ``gold`` is NaN or infinite.
    """
    given = function(messages=messages, reply=reply, row=dict(row), ended=ended)
    scores = given if isinstance(given, Mapping) else {"gold": given}
    if not isinstance(scores.get("gold"), int | float):
        raise RecipeError(f"`eval.gold: {reference}`: gave {given!r}; return a number, or a dict with `gold`")
    if not math.isfinite(scores["gold"]):
        raise NonFiniteError(f"{reference}: gave {scores['gold']} for the reply {reply!r}")
    return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
