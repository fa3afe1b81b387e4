"""chatalign: from a pretrained language model to a chat assistant, on Hugging Face's own parts.

The Python API is small: :func:`load_recipe`, :func:`run_stage`, :func:`run_pipeline`, the recipe classes in
:mod:`chatalign.recipe` and the pure maths in :mod:`chatalign.maths`. Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_recipe", "run_pipeline", "run_stage"]

if TYPE_CHECKING:
    from chatalign.pipeline import run_pipeline, run_stage
    from chatalign.recipe import load_recipe

_HOMES = {
    "load_recipe": "chatalign.recipe",
    "run_stage": "chatalign.pipeline",
    "run_pipeline": "chatalign.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use (PEP 562), so that ``import chatalign`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'chatalign' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
