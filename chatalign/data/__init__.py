"""Rows from files and the Hub to token ids with target marks. ``check_data`` and reading import no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatalign.data.checks import check_data
from chatalign.data.rows import Kind
from chatalign.data.sources import read_source

if TYPE_CHECKING:
    from chatalign.data.chat import encode_conversation, encode_prompt, render, template_stop_ids
    from chatalign.data.preparation import Prepared, prepare

_HOMES = {
    "Prepared": "preparation",
    "encode_conversation": "chat",
    "encode_prompt": "chat",
    "prepare": "preparation",
    "render": "chat",
    "template_stop_ids": "chat",
}
__all__ = [
    "Kind",
    "Prepared",
    "check_data",
    "encode_conversation",
    "encode_prompt",
    "prepare",
    "read_source",
    "render",
    "template_stop_ids",
]


def __getattr__(name: str) -> Any:
    """Import what needs tokenizers or datasets on first use (PEP 562), so that ``chatalign check`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'chatalign.data' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"chatalign.data.{_HOMES[name]}"), name)
