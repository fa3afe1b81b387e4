"""A reader for each format: one row of the file → one row of the schema. Raises BadRow (``field: problem → mend``).

The columns of each format are shown by example in docs/data.md. Checks that hold for every format are in
:mod:`chatalign.data.formats`, checks on turns in :mod:`chatalign.data.turns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatalign.data.rows import BadRow, Conversation, Messages, Preference, Prompt, Row, Text, Unpaired, kind_of
from chatalign.data.turns import check_order, ends_with, parse_json, read_tools, read_turns, short

RawRow = Mapping[str, Any]
PROMPT_COLUMNS = ("conversations", "messages", "prompt", "instruction")  # what may hold the prompt of a preference
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TRUE, _FALSE = ("true", "1", "+1"), ("false", "0", "-1")


def _messages(row: RawRow, column: str) -> Messages:
    messages = _under_system(row, read_turns(row.get(column), column), column)
    check_order(messages, column)
    return messages


def _under_system(row: RawRow, messages: Messages, column: str) -> Messages:
    """The turns of `column` under the row's ``system`` text, where it has one."""
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise BadRow("system", f"is {kind_of(system)}, not text", "write a string, or leave it out")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        raise BadRow("system", "a second system turn", f"keep the column or the turn in {column}")
    return [{"role": "system", "content": system}, *messages]


def read_messages(row: RawRow) -> Row:
    """``messages``: a list of role and content, with optional ``tools`` (in OpenAI's older files ``functions``)."""
    tools = "tools" if row.get("tools") is not None else "functions"
    return Conversation(messages=_messages(row, "messages"), tools=read_tools(row.get(tools), tools))


def read_sharegpt(row: RawRow) -> Row:
    """``conversations``: a list of from and value (or role and content), with optional ``tools``."""
    return Conversation(messages=_messages(row, "conversations"), tools=read_tools(row.get("tools")))


def read_alpaca(row: RawRow) -> Conversation:
    """``instruction``, ``input`` and ``output``, with optional ``system``, ``history`` and ``tools``."""
    prompt = _alpaca_prompt(row)
    reply = {"role": "assistant", "content": _text(row, "output")}
    return Conversation(messages=[*prompt, reply], tools=read_tools(row.get("tools")))


def _alpaca_prompt(row: RawRow) -> Messages:
    instruction = _text(row, "instruction")
    extra_input = row.get("input")
    if isinstance(extra_input, str) and extra_input.strip():
        instruction = f"{instruction}\n{extra_input}"
    elif extra_input is not None and not isinstance(extra_input, str):
        raise BadRow("input", f"is {kind_of(extra_input)}, not text", "write a string, or leave it out")
    history = row.get("history") or []
    history = parse_json(history, "history") if isinstance(history, str) else history
    if not isinstance(history, list | tuple):
        raise BadRow("history", f"is {kind_of(history)}, not a list of pairs", 'write [["instruction", "reply"], …]')
    messages: Messages = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history[{i}]", "is not a pair", 'write ["instruction", "reply"]')
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _nonempty(text, f"history[{i}]")})
    return _under_system(row, [*messages, {"role": "user", "content": instruction}], "history")


def read_prompt_completion(row: RawRow) -> Row:
    """``prompt`` and ``completion``, each a text or a list of turns; only the completion is learned."""
    prompt, completion, tools, raw = _prompt_and(row, "completion")
    return Conversation(messages=[*prompt, *completion], first_supervised=len(prompt), tools=tools, raw=raw)


def read_unpaired(row: RawRow) -> Row:
    """One reply with its ``label`` (LLaMA-Factory: ``kto_tag``): prompt and completion, alpaca, or a conversation."""
    label = read_label(row["label"]) if row.get("label") is not None else read_label(row.get("kto_tag"))
    held = [name for name in ("messages", "conversations") if row.get(name) is not None]
    if row.get("prompt") is None and not held:
        if row.get("instruction") is not None:
            return _unpaired(read_alpaca(row), "output", label)
        held = ["completion"]  # a whole conversation
    if not held:
        prompt, completion, tools, raw = _prompt_and(row, "completion")
        return Unpaired(prompt=prompt, completion=completion, label=label, tools=tools, raw=raw)
    conversation = Conversation(messages=_messages(row, held[0]), tools=read_tools(row.get("tools")))
    return _unpaired(conversation, held[0], label)


def _unpaired(row: Conversation, column: str, label: bool) -> Unpaired:
    ends_with(row.messages, "assistant", column)
    return Unpaired(prompt=row.messages[:-1], completion=row.messages[-1:], label=label, tools=row.tools)


def read_preference(row: RawRow) -> Row:
    """``chosen`` and ``rejected`` with their prompt: texts, turns, or conversations that begin alike."""
    tools = read_tools(row.get("tools"))
    sides = [row.get("chosen"), row.get("rejected")]
    plain = all(isinstance(side, str) for side in sides) and not any(map(looks_like_turns, sides))
    chosen, rejected = (
        [{"role": "assistant", "content": _text(row, side)}] if plain else read_turns(row.get(side), side)
        for side in ("chosen", "rejected")
    )
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise BadRow(side, "has no turns", "add the reply")
    whole = chosen[0]["role"] in ("system", "user")
    if whole != (rejected[0]["role"] in ("system", "user")):
        raise BadRow("rejected", "holds other turns than chosen", "give whole conversations or replies on both sides")
    if whole:
        prompt, chosen, rejected = _split_prefix(chosen, rejected)
        _check_repeated_prompt(row, prompt)
        return Preference(prompt=_under_system(row, prompt, "chosen"), chosen=chosen, rejected=rejected, tools=tools)
    prompt, plain_prompt = _prompt_of_replies(row)
    raw = plain and plain_prompt and tools is None
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, tools=tools, raw=raw)


def _prompt_of_replies(row: RawRow) -> tuple[Messages, bool]:
    """The prompt of a preference whose sides are replies, and whether it was one plain string."""
    held = [name for name in PROMPT_COLUMNS if row.get(name) is not None]
    if not held:
        raise BadRow("prompt", "is missing", "add the prompt, or put whole conversations in chosen and rejected")
    if len(held) > 1:
        both = " and ".join(f"`{name}`" for name in held)
        raise BadRow("prompt", f"{both} may each be it", f"say which: `columns: {{{held[-1]}: {held[-1]}}}`, for one")
    column = held[0]
    if column == "instruction":
        return _alpaca_prompt(row), False
    if isinstance(row[column], str) and not looks_like_turns(row[column]):
        prompt = _string_prompt(row, column)
        return prompt, len(prompt) == 1
    return _messages(row, column), False


def _check_repeated_prompt(row: RawRow, prompt: Messages) -> None:
    """A ``prompt`` of turns beside whole conversations has to be what they begin with."""
    given = row.get("prompt")
    if not given or (isinstance(given, str) and not looks_like_turns(given)):
        return  # a text beside conversations is a label of theirs: their first user turn, or all of it in one
    if [turn for turn in read_turns(given, "prompt") if turn["role"] != "system"] != [
        turn for turn in prompt if turn["role"] != "system"
    ]:
        mend = "make it the turns before the replies, or leave only these in chosen and rejected"
        raise BadRow("prompt", "is not what chosen and rejected begin with", mend)


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
    for side, against, turns in (("chosen", "rejected", chosen), ("rejected", "chosen", rejected)):
        if len(turns) > shared + 1:
            mend = f"cut both sides after their turn {shared}, so that they differ in the last reply only"
            raise BadRow(side, f"parts from {against} before its last turn", mend)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def read_hh(row: RawRow) -> Row:
    """Anthropic's transcripts: ``\\n\\nHuman: … \\n\\nAssistant: …`` (Bai et al., 2204.05862)."""
    chosen, rejected = (_hh_turns(_text(row, side), side) for side in ("chosen", "rejected"))
    prompt, chosen, rejected = _split_prefix(chosen, rejected)
    return Preference(prompt=_under_system(row, prompt, "chosen"), chosen=chosen, rejected=rejected)


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
    tools = read_tools(row.get("tools"))
    value = row.get("prompt")
    if isinstance(value, str) and not looks_like_turns(value):
        prompt = _string_prompt(row, "prompt")
        return Prompt(prompt=prompt, extra={}, tools=tools, raw=len(prompt) == 1 and tools is None)
    return Prompt(prompt=_messages(row, "prompt"), extra={}, tools=tools)


def read_label(value: Any, field: str = "label") -> bool:
    """True or False from true/false, 1/0 or +1/-1, as a value or as text; everything else is refused."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
    elif isinstance(value, bool) or (isinstance(value, int | float) and value in (1, 0, -1)):
        return value > 0
    raise BadRow(field, f"{short(value)} is not a thumb up or down", "write true or false")


def _prompt_and(row: RawRow, column: str) -> tuple[Messages, Messages, list[dict[str, Any]] | None, bool]:
    """The prompt's turns, the reply's turns, the tools, and whether there were two plain strings and nothing else."""
    tools = read_tools(row.get("tools"))
    prompt, reply = row.get("prompt"), row.get(column)
    plain_prompt = isinstance(prompt, str) and not looks_like_turns(prompt)
    plain_reply = isinstance(reply, str) and not looks_like_turns(reply)
    prompt_turns = _string_prompt(row, "prompt") if plain_prompt else _messages(row, "prompt")
    reply_turns = [{"role": "assistant", "content": _text(row, column)}] if plain_reply else read_turns(reply, column)
    raw = plain_prompt and plain_reply and len(prompt_turns) == 1 and tools is None
    return prompt_turns, reply_turns, tools, raw


def _string_prompt(row: RawRow, column: str) -> Messages:
    return _under_system(row, [{"role": "user", "content": _text(row, column)}], column)


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
