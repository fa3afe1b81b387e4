"""Columns of well-known files that could mean several things, and what to write in the recipe for them.

TRL, LLaMA-Factory, Axolotl and the alignment-handbook let such files through by a setting, or guess. Here they are
never guessed: the error offers the one key, ``columns``, with the value that makes the file readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatalign.data.rows import Kind
from chatalign.data.turns import likely_keys, yaml_name

# What files call each column of the schema, in the order in which they are offered; lower case.
_PROMPTS = ("prompt", "question", "query", "instruction", "problem", "input", "article", "message_1")
_REPLIES = ("completion", "response", "answer", "output", "solution", "generation", "corrected", "summary", "message_2")
_CONTEXTS = ("context", "article", "passage", "document")
_OTHERS: dict[str, tuple[str, ...]] = {
    "chosen": ("chosen", "chosen_response", "preferred", "preferred_output", "response"),
    "rejected": ("rejected", "rejected_response", "dispreferred", "non_preferred_output"),
    "label": ("label", "kto_tag", "thumb", "is_good"),
    "text": ("text", "content", "document", "body", "article"),
}
_SYSTEMS = ("system", "system_prompt")
# Files that nothing makes readable: the columns that give them away, what they hold, and the mend.
_REFUSED: list[tuple[set[str], str, str]] = [
    (
        {"completions", "labels"},
        "a label for each step (stepwise supervision), which no stage learns from",
        "write each whole reply as a row with prompt, completion and label",
    ),
    (
        {"segments"},
        "template-free segments, each with its own label",
        "write prompt and completion, with data.apply_chat_template: false",
    ),
    ({"prompt", "answers"}, "several answers to a prompt", "write pairs of them as prompt, chosen and rejected"),
    (
        {"messages", "rejected_response"},
        "a conversation with a second reply beside it",
        "write the conversation with either reply, as chosen and rejected",
    ),
    ({"input_ids"}, "token ids, and chatalign makes its own", "give the text that they were made of"),
    (
        {"question", "choices"},
        "multiple-choice questions",
        "write the choices into the question, and question and answer as prompt and completion",
    ),
]


def refused(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a file of a known shape holds that can't be trained on, and the mend; None for every other file."""
    names = {name.lower() for name, value in row.items() if value is not None}
    return next(((holds, mend) for needed, holds, mend in _REFUSED if needed <= names), None)


def suggestion(row: Mapping[str, Any], kind: Kind) -> str | None:
    """``columns: {…}`` as it would make a row of `kind` of these columns; None where nothing comes near."""
    columns = _turns(row, kind) or _texts(row, kind)
    if columns is None:
        return None
    pairs = ", ".join(f"{ours}: {yaml_name(theirs)}" for ours, theirs in columns.items() if ours != theirs)
    return f"`columns: {{{pairs}}}`" if pairs else None


def _turns(row: Mapping[str, Any], kind: Kind) -> dict[str, str] | None:
    """A column that holds a list of turns, where there is just one, and what it calls their role and text."""
    label = _all_found(row, {"label": _OTHERS["label"]}) if kind == "unpaired" else {}
    if kind not in ("conversation", "prompt", "unpaired") or label is None:
        return None
    lists = {
        name: value
        for name, value in row.items()
        if name not in ("prompt", "completion", "rejected") and isinstance(value, list) and value and _begins(value[0])
    }
    if len(lists) != 1:
        return None
    ((name, turns),) = lists.items()
    keys = None if {"role", "from"} & turns[0].keys() else likely_keys(turns[0])
    return {"messages": name, **({"role": keys[0], "content": keys[1]} if keys else {}), **label}


def _begins(turn: Any) -> bool:
    """Whether this is a turn that a conversation may begin with: not a reply."""
    if not isinstance(turn, dict) or any(turn.get(key) in ("assistant", "gpt") for key in ("role", "from")):
        return False
    return bool({"role", "from"} & turn.keys()) or likely_keys(turn) is not None


def _texts(row: Mapping[str, Any], kind: Kind) -> dict[str, str] | None:
    if kind == "text":
        return _all_found(row, {"text": _OTHERS["text"]})
    system = _all_found(row, {"system": _SYSTEMS}) or {}
    if kind == "prompt":
        columns = _all_found(row, {"prompt": _PROMPTS})
    elif kind == "conversation":
        columns = _with_context(row) or _all_found(row, {"prompt": _PROMPTS, "completion": (*_REPLIES, "chosen")})
    else:
        wanted = {name: _OTHERS[name] for name in (("chosen", "rejected") if kind == "preference" else ("label",))}
        replies = {} if kind == "preference" else {"completion": _REPLIES}
        columns = _all_found(row, {"prompt": _PROMPTS} | replies | wanted)
    return None if columns is None else columns | system


def _with_context(row: Mapping[str, Any]) -> dict[str, str] | None:
    """An instruction with its context, or a context with its question, as alpaca joins them."""
    context = _first(row, _CONTEXTS)
    if instruction := _first(row, ("instruction",)):
        context = context or _first(row, ("input",))
        reply = _first(row, _REPLIES)
        found = {"instruction": instruction, "input": context, "output": reply}
    else:
        found = {"instruction": context, "input": _first(row, ("question",)), "output": _first(row, _REPLIES)}
    return {ours: theirs for ours, theirs in found.items() if theirs} if all(found.values()) else None


def _all_found(row: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> dict[str, str] | None:
    """A column of `row` for each of the schema's names; None where one lacks it."""
    found: dict[str, str] = {}
    for ours, usual in wanted.items():
        theirs = _first(row, usual, taken=tuple(found.values()))
        if theirs is None:
            return None
        found[ours] = theirs
    return found


def _first(row: Mapping[str, Any], usual: tuple[str, ...], taken: tuple[str, ...] = ()) -> str | None:
    names = {name.lower(): name for name, value in row.items() if value is not None and name not in taken}
    return next((names[name] for name in usual if name in names), None)
