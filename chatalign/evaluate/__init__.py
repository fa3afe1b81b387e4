"""Evaluation: replies to held-out prompts, gold and reward-model scores, win rates, KL, perplexity, text metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatalign.evaluate.stage import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """Import the stage on first use (PEP 562), so that ``python -m chatalign.evaluate`` refuses a recipe without it."""
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from chatalign.evaluate.stage import run

    return run
