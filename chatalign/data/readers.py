"""A reader for each format: one row of the file → one row of the schema. Raises BadRow (``field: problem → mend``).

The columns of each format are shown by example in docs/data.md. Checks that hold for every format are in
:mod:`chatalign.data.formats`, checks on turns in :mod:`chatalign.data.turns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatalign.data.rows import BadRow, Conversation, Messages, Preference, Prompt, Row, Text, Unpaired, kind_of
from chatalign.data.turns import check_order, ends_with, parse_json, read_tools, read_turns

RawRow = Mapping[str, Any]
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TRUE, _FALSE = ("true", "1", "+1"), ("false", "0", "-1")


def _messages(row: RawRow, column: str) -> Messages:
    messages = read_turns(row.get(column), column)
    if isinstance(row.get("system"), str) and row["system"].strip():
        if messages and messages[0]["role"] == "system":
            raise BadRow("system", "a second system turn", f"keep the column or the turn in {column}")
        messages = [{"role": "system", "content": row["system"]}, *messages]
    check_order(messages, column)
    return messages


def read_messages(row: RawRow) -> Row:
    """``messages``: a list of role and content, with optional ``tools``."""
    return Conversation(messages=_messages(row, "messages"), tools=read_tools(row.get("tools")))


def read_sharegpt(row: RawRow) -> Row:
    """``conversations``: a list of from and value (or role and content), with optional ``tools``."""
    return Conversation(messages=_messages(row, "conversations"), tools=read_tools(row.get("tools")))


def read_alpaca(row: RawRow) -> Row:
    """``instruction``, ``input`` and ``output``, with optional ``system`` and ``history``."""
    instruction, output = _text(row, "instruction"), _text(row, "output")
    extra_input = row.get("input")
    if isinstance(extra_input, str) and extra_input.strip():
        instruction = f"{instruction}\n{extra_input}"
    elif extra_input is not None and not isinstance(extra_input, str):
        raise BadRow("input", f"is {kind_of(extra_input)}, not text", "write a string, or leave it out")
    messages: Messages = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.append({"role": "system", "content": row["system"]})
    history = row.get("history") or []
    history = parse_json(history, "history") if isinstance(history, str) else history
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history[{i}]", "is not a pair", 'write ["instruction", "reply"]')
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _nonempty(text, f"history[{i}]")})
    messages += [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
    return Conversation(messages=messages)


def read_prompt_completion(row: RawRow) -> Row:
    """``prompt`` and ``completion``, each a text or a list of turns; only the completion is learned."""
    prompt, completion, raw = _prompt_and(row, "completion")
    return Conversation(
        messages=[*prompt, *completion], first_supervised=len(prompt), tools=read_tools(row.get("tools")), raw=raw
    )


def read_unpaired(row: RawRow) -> Row:
    """One reply with its ``label``: prompt and completion, or a conversation that ends in the reply."""
    label = read_label(row.get("label"))
    column = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    tools = read_tools(row.get("tools"))
    if column is None:
        prompt, completion, raw = _prompt_and(row, "completion")
        return Unpaired(prompt=prompt, completion=completion, label=label, tools=tools, raw=raw)
    messages = _messages(row, column)
    ends_with(messages, "assistant", column)
    return Unpaired(prompt=messages[:-1], completion=messages[-1:], label=label, tools=tools)


def read_preference(row: RawRow) -> Row:
    """``chosen`` and ``rejected`` with their prompt: texts, turns, or conversations that begin alike."""
    tools = read_tools(row.get("tools"))
    column = next((name for name in ("conversations", "messages", "prompt") if row.get(name) is not None), None)
    if all(isinstance(row.get(side), str) for side in ("chosen", "rejected")) and not looks_like_turns(row["chosen"]):
        chosen, rejected = ([{"role": "assistant", "content": _text(row, side)}] for side in ("chosen", "rejected"))
    else:
        chosen, rejected = (read_turns(row.get(side), side) for side in ("chosen", "rejected"))
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise BadRow(side, "has no turns", "add the reply")
    full = chosen[0]["role"] in ("system", "user")
    if full != (rejected[0]["role"] in ("system", "user")):
        raise BadRow("rejected", "holds other turns than chosen", "give whole conversations or replies on both sides")
    raw = False
    if full:
        prompt, chosen, rejected = _split_prefix(chosen, rejected)
        if isinstance(row.get("system"), str) and row["system"].strip() and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": row["system"]}, *prompt]
    elif column is None:
        raise BadRow("prompt", "is missing", "add the prompt, or put whole conversations in chosen and rejected")
    elif isinstance(row[column], str) and not looks_like_turns(row[column]):
        prompt = _string_prompt(row)
        raw = len(prompt) == 1 and isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
    else:
        prompt = _messages(row, column)
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, tools=tools, raw=raw)


def _split_prefix(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Whole conversations → their common prefix, and the one reply on each side."""
    check_order(chosen, "chosen")
    check_order(rejected, "rejected")
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    if shared == 0:
        raise BadRow("rejected", "starts with another prompt than chosen", "give both sides one prompt")
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def read_hh(row: RawRow) -> Row:
    """Anthropic's transcripts: ``\\n\\nHuman: … \\n\\nAssistant: …`` (Bai et al., 2204.05862)."""
    chosen, rejected = (_hh_turns(_text(row, side), side) for side in ("chosen", "rejected"))
    prompt, chosen, rejected = _split_prefix(chosen, rejected)
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


def _hh_turns(transcript: str, side: str) -> Messages:
    messages: Messages = []
    rest = "\n\n" + transcript.lstrip()
    while rest:
        role, tag = ("user", _HUMAN) if rest.startswith(_HUMAN) else ("assistant", _ASSISTANT)
        if not rest.startswith(tag):
            raise BadRow(side, "is not a Human/Assistant transcript", "start it with \\n\\nHuman:")
        rest = rest[len(tag) :]
        ends = [at for at in (rest.find(_HUMAN), rest.find(_ASSISTANT)) if at >= 0]
        end = min(ends, default=len(rest))
        messages.append({"role": role, "content": _nonempty(rest[:end].strip(), f"{side}[{len(messages)}]")})
        rest = rest[end:]
    return messages


def read_text(row: RawRow) -> Row:
    """``text``: a document."""
    return Text(text=_text(row, "text"))


def read_prompt(row: RawRow) -> Row:
    """``prompt``, or any row that begins with one: what PPO and evaluation answer."""
    value = row.get("prompt")
    if isinstance(value, str) and not looks_like_turns(value):
        prompt = _string_prompt(row)
        return Prompt(prompt=prompt, extra={}, raw=len(prompt) == 1)
    return Prompt(prompt=_messages(row, "prompt"), extra={}, tools=read_tools(row.get("tools")))


def read_label(value: Any, field: str = "label") -> bool:
    """True or False from true/false, 1/0 or +1/-1, as a value or as text; everything else is refused."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
    elif isinstance(value, bool) or (isinstance(value, int | float) and value in (1, 0, -1)):
        return value > 0
    raise BadRow(field, f"{value!r} is not a thumb up or down", "write true or false")


def _prompt_and(row: RawRow, column: str) -> tuple[Messages, Messages, bool]:
    """The prompt's turns, the reply's turns, and whether both were plain strings."""
    prompt, reply = row.get("prompt"), row.get(column)
    plain_prompt = isinstance(prompt, str) and not looks_like_turns(prompt)
    plain_reply = isinstance(reply, str) and not looks_like_turns(reply)
    prompt_turns = _string_prompt(row) if plain_prompt else _messages(row, "prompt")
    reply_turns = [{"role": "assistant", "content": _text(row, column)}] if plain_reply else read_turns(reply, column)
    return prompt_turns, reply_turns, plain_prompt and plain_reply and len(prompt_turns) == 1


def _string_prompt(row: RawRow) -> Messages:
    system = row.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return [*before, {"role": "user", "content": _text(row, "prompt")}]


def _text(row: RawRow, column: str) -> str:
    return _nonempty(row.get(column), column)


def _nonempty(value: Any, field: str) -> str:
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"is {kind_of(value)}, not text"
        raise BadRow(field, problem, "write a string")
    if not value.strip():
        raise BadRow(field, "is empty", "write the text, or take the row out")
    return value


def looks_like_turns(text: Any) -> bool:
    """Whether a string is a JSON list of turns, as CSV files hold them."""
    start = text.lstrip()[:80] if isinstance(text, str) else ""
    return start[:1] == "[" and ('"role"' in start or '"from"' in start)
