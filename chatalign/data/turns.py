"""Messages as files write them → checked messages of the schema. Every refusal is a BadRow that names the turn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chatalign.data.json_values import JsonReader, check_value
from chatalign.data.rows import BadRow, Broken, Message, Messages, Tools, kind_of

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
# Keys by which OpenAI (weight), Axolotl (train, training) and ms-swift (loss, loss_scale) say what is learned.
_TRAIN_KEYS = ("train", "training", "weight", "loss", "loss_scale")
_JSON = JsonReader()
_PART_OF_A_TURN = ("train_detail", "training_detail", "reasoning_training_detail")
MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))
# What other files call a turn's role and text: offered in errors, never assumed.
_OFTEN_ROLE = ("speaker", "author", "sender", "name", "user", "who", "type")
_OFTEN_TEXT = ("content", "value", "text", "message", "body", "utterance")


def read_turns(value: Any, field: str) -> Messages:
    """Messages from a list of turns, or one turn; ``role``/``content`` and ``from``/``value`` may both occur.

    A JSON string of either is parsed (CSV files have no lists). Roles and contents are checked one by one here;
    their order in :func:`check_order`. Tool results that name their calls by id come in the order of the calls.
    """
    value = parse_json(value, field) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        raise BadRow(field, f"is {kind_of(value)}, not a list of turns", 'write [{"role": "user", "content": "…"}, …]')
    messages = [_read_turn(turn, f"{field}[{i}]", value) for i, turn in enumerate(value)]
    return _pair_results(messages, field) if max(map(len, messages), default=0) > 2 else messages


def _read_turn(turn: Any, field: str, turns: Sequence[Any]) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(field, f"is {kind_of(turn)}, not a turn", 'write {"role": …, "content": …}')
    role_key, content_key = ("role", "content") if turn.get("role") is not None else ("from", "value")
    named = turn.get(role_key)
    role = (_ROLES.get(named) or _ROLES.get(named.strip().lower())) if isinstance(named, str) else None
    if role is None:
        raise _no_role(turn, named, field, turns)
    if content_key not in turn:
        other = "value" if content_key == "content" else "content"
        content_key = other if other in turn else content_key
    where = f"{field}.{content_key}"
    content = turn.get(content_key)
    if not isinstance(content, str):
        content = read_content(content, where, may_be_none="tool_calls" in turn or "function_call" in turn)
    if role == "function_call":
        message: Message = {"role": "assistant", "content": "", "tool_calls": _read_calls(content, where)}
    else:
        message = {"role": role, "content": content}
    if len(turn) > 2 or content_key not in turn:
        _read_more(turn, message, field)
    if not content.strip() and "tool_calls" not in message:
        raise BadRow(where, "is empty", "write the text, or take the turn out")
    return message


def _no_role(turn: Mapping[str, Any], named: Any, field: str, turns: Sequence[Any]) -> BadRow:
    if named is not None:
        mend = "use user, assistant, system or tool"
        if isinstance(named, str):
            mend += f", or say `roles: {{{_likely_roles(named, turns)}}}` (assistant, system, tool, function_call)"
        role_key = "role" if turn.get("role") is not None else "from"
        return BadRow(f"{field}.{role_key}", f"{short(named)} is not a known role", mend)
    if (keys := likely_keys(turn)) is None:
        return BadRow(field, "has no `role`", "add `role` (or `from`): user, assistant, system or tool")
    mend = f"say `columns: {{role: {keys[0]}, content: {keys[1]}}}`"
    return BadRow(field, f"has no `role`, its keys are {listed(turn)}", mend)


def _likely_roles(named: str, turns: Sequence[Any]) -> str:
    """The map of roles to offer: where two names are unknown, whoever speaks first is the user."""
    names = [turn.get("role") or turn.get("from") for turn in turns if isinstance(turn, dict)]
    unknown = list(
        dict.fromkeys(name for name in names if isinstance(name, str) and name.strip().lower() not in _ROLES)
    )
    speakers = unknown if len(unknown) == 2 else [named]
    return ", ".join(f"{yaml_name(name)}: {role}" for name, role in zip(speakers, ("user", "assistant"), strict=False))


def likely_keys(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of a turn that may be its role and its text, to be offered in an error; None where none look so."""
    role = next((key for key in _OFTEN_ROLE if isinstance(turn.get(key), str)), None)
    text = next((key for key in _OFTEN_TEXT if key != role and isinstance(turn.get(key), str)), None)
    return None if role is None or text is None else (role, text)


def _read_more(turn: Mapping[str, Any], message: Message, field: str) -> None:
    """What a turn may hold beside role and content, into `message`; what would be lost is refused."""
    for key in MEDIA.intersection(turn):
        if has_media(turn[key]):
            raise BadRow(f"{field}.{key}", *media_problem(key))
    calls = turn.get("tool_calls") or turn.get("function_call")  # the latter is OpenAI's older form: one call
    if calls and "tool_calls" not in message:
        if message["role"] != "assistant":
            raise BadRow(
                f"{field}.tool_calls", f"a {message['role']} turn with calls", "give them the assistant's role"
            )
        message["tool_calls"] = _read_calls(calls, f"{field}.tool_calls")
    if message["role"] == "tool":
        message.update({key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)})
    message.update({key: turn[key] for key in ("reasoning_content", "thinking") if isinstance(turn.get(key), str)})
    if not _is_learned(turn, message["role"], field):
        message["train"] = False


def _is_learned(turn: Mapping[str, Any], role: str, field: str) -> bool:
    """Whether a reply is to be learned, by the keys that say so; True for every other turn."""
    for key in _PART_OF_A_TURN:
        if turn.get(key):
            raise BadRow(f"{field}.{key}", "marks parts of a turn", "learn the turn whole, by `train`: true or false")
    told = {key: turn[key] for key in _TRAIN_KEYS if turn.get(key) is not None}
    if not told:
        return True
    for key, value in told.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(f"{field}.{key}", f"{short(value)} is neither true nor false", "write true (1) or false (0)")
    if len(set(map(bool, told.values()))) > 1:
        raise BadRow(field, f"{' and '.join(told)} contradict each other", "keep one of them")
    learned = bool(next(iter(told.values())))
    if learned and role != "assistant":
        key = next(iter(told))
        raise BadRow(f"{field}.{key}", f"asks to learn a {role} turn", "write false: only the assistant's are learned")
    return learned or role != "assistant"


def read_content(value: Any, field: str, *, may_be_none: bool = False) -> str:
    """A turn's text; a list of text parts (``{"type": "text", "text": …}``) is joined, other parts are refused."""
    if isinstance(value, str):
        return value
    if value is None and may_be_none:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                mend = "take the row out, or keep text parts only"
                raise BadRow(field, f"has a part of type {short(part.get('type'))}", mend)
            if part.get("train") is not None or part.get("weight") is not None:
                raise BadRow(field, "marks parts of a turn", "learn the turn whole, by `train`: true or false")
        return "".join(part["text"] for part in value)
    raise BadRow(field, f"is {kind_of(value)}, not text", "write a string")


def has_media(value: Any) -> bool:
    """Whether a column or key of images, videos or sounds holds some."""
    return any(value) if isinstance(value, list | tuple) else bool(value)


def media_problem(name: str) -> tuple[str, str]:
    """What is wrong with a row that has media under `name`, and the mend."""
    noun = {"i": "images", "v": "videos", "a": "sound"}[name[0]]
    return f"holds {noun}, and only text is trained on", f"take the row out, or `{name}` where its text is enough"


def read_tools(value: Any, field: str = "tools") -> Tools | None:
    """Tools as a list of JSON schemas, from a list, one schema, or JSON text of these; None where there are none."""
    text = isinstance(value, str)
    if isinstance(value, str):
        value = parse_json(value, field) if value.strip() else None
    if value in (None, [], {}):
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(field, f"is {kind_of(value)}, not a list of tool schemas", _TOOLS_MEND)
    tools = [parse_json(tool, f"{field}[{i}]") if isinstance(tool, str) else tool for i, tool in enumerate(value)]
    tools = tools if text else _without_nulls(tools)
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(field, f"is {kind_of(value)}, not a list of tool schemas", _TOOLS_MEND)
    return tools


def _without_nulls(value: Any) -> Any:
    """An object without the keys that hold null: parquet fills the objects of a column up with each other's keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


_TOOLS_MEND = 'write [{"name": …, "parameters": …}]'


def rename_turns(value: Any, keys: Mapping[str, str], roles: Mapping[str, str]) -> Any:
    """Turns with the schema's keys and roles in place of the file's; what is no list of turns stays as it is."""
    turns = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            turns = _JSON.whole(value)
        except json.JSONDecodeError:  # a text that only looks so, or is refused where turns are needed
            return value
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, dict) for turn in turns):
        return value
    return [_rename_turn(turn, keys, roles) for turn in turns]


def _rename_turn(turn: Mapping[str, Any], keys: Mapping[str, str], roles: Mapping[str, str]) -> dict[str, Any]:
    renamed = {key: value for key, value in turn.items() if key not in keys.values()}
    renamed |= {ours: turn[theirs] for ours, theirs in keys.items() if theirs in turn}
    for key in ("role", "from"):
        if isinstance(renamed.get(key), str):
            renamed[key] = roles.get(renamed[key], renamed[key])
    return renamed


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
        return f"a tool result after {_a(before)} turn", "put the assistant's tool call before it"
    if before == "call":
        return f"{_a(role)} turn after a tool call", "add the tool's result between them"
    return f"two {role} turns in a row", "merge them, or add the turn between them"


def _a(role: str) -> str:
    return f"{'an' if role == 'assistant' else 'a'} {role}"


def ends_with(messages: Messages, role: str, field: str) -> None:
    """The last turn is `role`'s; raises BadRow otherwise."""
    if messages[-1]["role"] != role:
        mend = "add the reply" if role == "assistant" else "end it before the assistant's reply"
        raise BadRow(f"{field}[{len(messages) - 1}]", f"the last turn is the {messages[-1]['role']}'s", mend)


def parse_json(text: str, field: str) -> Any:
    """A JSON value held in a string."""
    try:
        value = _JSON.whole(text)
    except json.JSONDecodeError as error:
        raise BadRow(field, "is a string of broken JSON", f"mend it ({error.msg} at character {error.pos})") from None
    if isinstance(value, Broken):
        raise BadRow(field, f"is a string of JSON in which {value.reason}", value.mend)
    check_value(value, field)
    return value


def _read_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls from one, a list, or JSON text of either; an ``id`` stays until the results are paired with them."""
    text = isinstance(value, str)
    value = parse_json(value, field) if text else value
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(field, "a tool call has no `name`", 'write {"name": …, "arguments": {…}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{field}.arguments") if arguments.strip() else {}
        elif not text:
            arguments = _without_nulls(arguments)
        if not isinstance(arguments, dict | None):
            raise BadRow(f"{field}.arguments", f"is {kind_of(arguments)}, not an object", 'write {"name": value, …}')
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        calls.append({**made, "id": call["id"]} if isinstance(call.get("id"), str) else made)
    return calls


def _pair_results(messages: Messages, field: str) -> Messages:
    """The turns with results that name their call by id in the order of the calls, which templates pair them by.

    Ids themselves go: templates that ask for them get their own.
    """
    made: Messages = []
    at = 0
    while at < len(messages):
        turn, at = messages[at], at + 1
        turn.pop("tool_call_id", None)
        made.append(turn)
        if "tool_calls" not in turn:
            continue
        first = at
        while at < len(messages) and messages[at]["role"] == "tool":
            at += 1
        results = messages[first:at]
        call_ids = [call.pop("id", None) for call in turn["tool_calls"]]
        result_ids = [result.pop("tool_call_id", None) for result in results]
        if any(call_ids) and any(result_ids):
            if len(set(call_ids)) < len(call_ids) or sorted(map(str, call_ids)) != sorted(map(str, result_ids)):
                problem = f"calls {short(call_ids)} are answered by results of {short(result_ids)}"
                raise BadRow(f"{field}[{first - 1}].tool_calls", problem, "give each call one result with its id")
            results = [results[result_ids.index(call_id)] for call_id in call_ids]
        made += results
    return made


def short(value: Any) -> str:
    """A value for an error's one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def listed(names: Iterable[str]) -> str:
    """Names of columns or keys for an error's one line."""
    return ", ".join(f"`{repr(name)[1:-1]}`" for name in names)


def yaml_name(name: str) -> str:
    """A name as a recipe has to write it: quoted where YAML would take it for something else."""
    plain = name.isidentifier() and name.isascii() and name.lower() not in ("yes", "no", "on", "off", "true", "false")
    return name if plain and name.lower() not in ("null", "y", "n") else json.dumps(name, ensure_ascii=False)
