"""Messages as files write them → checked messages of the schema. Every refusal is a BadRow that names the turn."""

from __future__ import annotations

import json
from typing import Any

from chatalign.data.rows import BadRow, Message, Messages, Tools, kind_of

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_MAY_FOLLOW = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "call": {"tool"},
    "tool": {"tool", "assistant", "user"},
}


def read_turns(value: Any, field: str) -> Messages:
    """Messages from a list of turns, or one turn; ``role``/``content`` and ``from``/``value`` may both occur.

    A JSON string of either is parsed (CSV files have no lists). Roles and contents are checked one by one here;
    their order in :func:`check_order`.
    """
    value = parse_json(value, field) if isinstance(value, str) and value.lstrip()[:1] in "[{" else value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        raise BadRow(field, f"is {kind_of(value)}, not a list of turns", 'write [{"role": "user", "content": "…"}, …]')
    return [_read_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def _read_turn(turn: Any, field: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(field, f"is {kind_of(turn)}, not a turn", 'write {"role": …, "content": …}')
    role_key, content_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    if role_key not in turn:
        raise BadRow(field, "has no `role`", "add `role` (or `from`): user, assistant, system or tool")
    named = turn[role_key]
    role = _ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise BadRow(f"{field}.{role_key}", f"{named!r} is not a known role", "use user, assistant, system or tool")
    content = read_content(turn.get(content_key), f"{field}.{content_key}", may_be_none="tool_calls" in turn)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls_from_text(content, f"{field}.{content_key}")}
    message: Message = {"role": role, "content": content}
    if role == "assistant" and turn.get("tool_calls"):
        message["tool_calls"] = _read_calls(turn["tool_calls"], f"{field}.tool_calls")
    if role == "tool" and isinstance(turn.get("name"), str):
        message["name"] = turn["name"]
    if isinstance(turn.get("reasoning_content"), str):
        message["reasoning_content"] = turn["reasoning_content"]
    if not content.strip() and "tool_calls" not in message:
        raise BadRow(f"{field}.{content_key}", "is empty", "write the text, or take the turn out")
    return message


def read_content(value: Any, field: str, *, may_be_none: bool = False) -> str:
    """A turn's text; a list of text parts (``{"type": "text", "text": …}``) is joined, other parts are refused."""
    if isinstance(value, str):
        return value
    if value is None and may_be_none:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise BadRow(field, f"has a part of type {part.get('type')!r}", "keep text parts only")
        return "".join(part["text"] for part in value)
    raise BadRow(field, f"is {kind_of(value)}, not text", "write a string")


def read_tools(value: Any, field: str = "tools") -> Tools | None:
    """Tools as a list of JSON schemas, from a list or a JSON string; None where there are none."""
    if value is None or value == "":
        return None
    value = parse_json(value, field) if isinstance(value, str) else value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(field, f"is {kind_of(value)}, not a list of tool schemas", 'write [{"name": …, "parameters": …}]')
    return value or None


def check_order(messages: Messages, field: str) -> None:
    """A system message only first, then user and assistant in turn; tool results only after a call or a result."""
    if not messages:
        raise BadRow(field, "has no turns", "add at least one user turn")
    before: str | None = None
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            raise BadRow(f"{field}[{i}]", *_order_problem(role, before))
        before = "call" if "tool_calls" in message else role


def _order_problem(role: str, before: str | None) -> tuple[str, str]:
    if role == "system":
        problem = "a second system turn" if before == "system" else "a system turn that isn't first"
        return problem, "keep one system turn, at the start"
    if before is None or before == "system":
        return f"the first turn is the {role}'s", "start with a user turn"
    if role == "tool":
        return f"a tool result after a {before} turn", "put the assistant's tool call before it"
    if before == "call":
        return f"a {role} turn after a tool call", "add the tool's result between them"
    return f"two {role} turns in a row", "merge them, or add the turn between them"


def ends_with(messages: Messages, role: str, field: str) -> None:
    """The last turn is `role`'s; raises BadRow otherwise."""
    if messages[-1]["role"] != role:
        mend = "add the reply" if role == "assistant" else "end it before the assistant's reply"
        raise BadRow(f"{field}[{len(messages) - 1}]", f"the last turn is the {messages[-1]['role']}'s", mend)


def parse_json(text: str, field: str) -> Any:
    """A JSON value held in a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(field, "is a string of broken JSON", f"mend it ({error.msg} at character {error.pos})") from None


def _calls_from_text(text: str, field: str) -> list[dict[str, Any]]:
    return _read_calls(parse_json(text, field), field)


def _read_calls(value: Any, field: str) -> list[dict[str, Any]]:
    value = parse_json(value, field) if isinstance(value, str) else value
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(field, "a tool call has no `name`", 'write {"name": …, "arguments": {…}}')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{field}.arguments") if arguments.strip() else {}
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls
