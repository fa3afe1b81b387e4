"""What a server would put in place of a recipe's sampling (row 14 of docs/guard.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatalign.errors import GuardError

# Read from generation_config.json by ``vllm serve`` (``--generation-config auto``) for what a request leaves out.
_SERVED_DEFAULTS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


def refuse_overridden(fields: Mapping[str, Any], generation_config: Any) -> None:
    """Raise GuardError where a request leaves out what the model's generation config sets."""
    for name, field in _SERVED_DEFAULTS.items():
        value = getattr(generation_config, name, None)
        if value is not None and field not in fields:
            raise GuardError(
                f"the model's generation_config.json sets `{name}: {value}`, and the request to vLLM says nothing "
                "of it: replies would not be drawn as the recipe says; start vLLM with --generation-config vllm"
            )
