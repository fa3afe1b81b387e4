"""Functions of others' modules that a stage puts its own in the place of, so that the process can be given back.

transformers' models look some of theirs up in their module: what one stage replaced, the next would run too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_own: dict[tuple[ModuleType, str], Any] = {}  # what stood there before


def replace(module: ModuleType, name: str, value: Any) -> None:
    """Set a module's attribute, to be put back by :func:`put_back`."""
    _own.setdefault((module, name), getattr(module, name))
    setattr(module, name, value)


@contextmanager
def noting_replaced(module: ModuleType) -> Iterator[None]:
    """Have what others replace in `module` meanwhile put back too."""
    before = dict(vars(module))
    try:
        yield
    finally:  # half of it may be replaced where that failed
        for name, value in before.items():
            if getattr(module, name, None) is not value:
                _own.setdefault((module, name), value)


def put_back() -> None:
    """Set every attribute to what stood there at first."""
    for (module, name), value in _own.items():
        setattr(module, name, value)
    _own.clear()
