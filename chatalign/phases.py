"""Where a stage's seconds go: import, check, data, model, train, save, report. Light: no torch here.

A process runs one stage at a time, so that there is one account; a phase inside another is taken off the outer one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

LOOPS = ("train", "score")  # the model at work; all else is what it takes to get there and to keep the result

_account: dict[str, float] = {}
_running: list[str] = []
_since = time.perf_counter()


def _charge() -> None:
    """Put the time since the last change on the innermost running phase."""
    global _since
    now = time.perf_counter()
    name = _running[-1] if _running else "other"
    _account[name] = _account.get(name, 0.0) + now - _since
    _since = now


def open_account() -> None:
    """Begin the next stage's account at zero."""
    _charge()
    _account.clear()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Charge the time inside to phase `name`; also a decorator."""
    _charge()
    _running.append(name)
    try:
        yield
    finally:
        _charge()
        _running.pop()


def account() -> dict[str, float]:
    """Seconds by phase since the account was opened, ``other`` being the rest; milliseconds at the finest."""
    _charge()
    return {name: round(seconds, 3) for name, seconds in _account.items() if seconds >= 0.0005}


def overhead(seconds: Mapping[str, float]) -> float:
    """What an account holds beside the loops of training and scoring."""
    return sum(spent for name, spent in seconds.items() if name not in LOOPS)
