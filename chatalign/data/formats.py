"""Which format a row is in, by its columns, and rows of every format brought to the one schema.

Nothing is guessed from names that could mean several things (question/answer, prompt/response): those need the
source's ``columns`` map, and the error says which (:mod:`chatalign.data.mappings`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from chatalign.data import readers
from chatalign.data.json_values import check_value
from chatalign.data.mappings import refused, suggestion
from chatalign.data.readers import PROMPT_COLUMNS, RawRow, looks_like_turns
from chatalign.data.rows import BadRow, Conversation, Kind, Messages, Preference, Prompt, Row, Text, Unpaired
from chatalign.data.turns import MEDIA, check_order, ends_with, has_media, listed, media_problem, rename_turns
from chatalign.errors import DataError
from chatalign.recipe import DatasetSource
from chatalign.recipe.sections import Format

SCHEMA_COLUMNS = (
    *("messages", "conversations", "tools", "system", "prompt", "completion", "chosen", "rejected", "label", "text"),
    *("instruction", "input", "output", "history"),
)
_READ_COLUMNS = (*SCHEMA_COLUMNS, "functions", "kto_tag")
TURN_KEYS = ("role", "content", "train", "reasoning_content")  # of turns, and named in a `columns` map all the same
KINDS_OF: dict[Format, tuple[Kind, ...]] = {
    "messages": ("conversation", "prompt"),
    "sharegpt": ("conversation", "prompt"),
    "alpaca": ("conversation", "prompt"),
    "prompt_completion": ("conversation", "prompt"),
    "preference": ("preference", "prompt"),
    "hh": ("preference", "prompt"),
    "unpaired": ("unpaired",),
    "text": ("text",),
    "prompt": ("prompt",),
}
NEEDED: dict[Kind, str] = {
    "conversation": "demonstrations (messages, conversations, instruction/output or prompt/completion)",
    "text": "plain text (a `text` column or a .txt file)",
    "preference": "preference pairs (chosen and rejected)",
    "prompt": "prompts (a `prompt` column, or demonstrations whose prompts are taken)",
    "unpaired": "replies with a `label` (messages or prompt/completion)",
}
_DEMONSTRATIONS: dict[Format, set[str]] = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
}
_TELLING = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "instruction", "output", "text")
_ONE_COLUMN: tuple[Format, ...] = ("text", "prompt")
_WITH_TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_LOST = MEDIA | {"chat_template_kwargs"}  # columns that mean something to training elsewhere


def recognise(row: RawRow) -> Format | None:
    """The format of a row by the columns that hold something; None where no format, or more than one, has these."""
    has = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        texts = [row["chosen"], row["rejected"]]
        if all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in texts):
            return "hh"
        return "preference"
    shown = _demonstrations(row)
    if len(shown) > 1:
        return None
    if _has_label(row, shown):
        return "unpaired"
    if shown:
        return shown[0]
    if "text" in has:
        return "text"
    return "prompt" if "prompt" in has else None


def _demonstrations(row: RawRow) -> list[Format]:
    """The formats of demonstrations whose columns all hold something."""
    return [name for name, needed in _DEMONSTRATIONS.items() if all(row.get(column) is not None for column in needed)]


def _has_label(row: RawRow, shown: list[Format]) -> bool:
    """Whether the row has a reply and a label that is about it."""
    if row.get("kto_tag") is None and row.get("label") is None:
        return False
    if shown == ["alpaca"]:  # instructions are often labelled by their kind
        return row.get("kto_tag") is not None or row["label"] in (True, False)
    return bool(shown) or isinstance(row.get("completion"), list) or looks_like_turns(row.get("completion"))


def rename(row: RawRow, source: DatasetSource) -> RawRow:
    """The row with the schema's names of columns, turns' keys and roles in place of the file's.

    A column that isn't there is a BadRow. Of the columns that may hold a prompt, those that the map leaves out go
    where it names one: ``columns: {prompt: prompt}`` settles which it is.
    """
    columns = {ours: theirs for ours, theirs in source.columns.items() if ours not in TURN_KEYS}
    keys = {ours: theirs for ours, theirs in source.columns.items() if ours in TURN_KEYS}
    for ours, theirs in columns.items():
        if theirs not in row:
            near = get_close_matches(theirs, list(row), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"the row's columns are {listed(row)}"
            raise BadRow(theirs, f"`columns.{ours}` names a column that isn't there", hint)
    gone = {*columns.values(), *(PROMPT_COLUMNS if not columns.keys().isdisjoint(PROMPT_COLUMNS) else ())}
    renamed = {name: value for name, value in row.items() if name not in gone}
    renamed |= {ours: row[theirs] for ours, theirs in columns.items()}
    if keys or source.roles:
        turns = {name: rename_turns(renamed[name], keys, source.roles) for name in _WITH_TURNS if name in renamed}
        _check_keys(turns, keys)
        renamed |= turns
    return renamed


def _check_keys(columns: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Raise BadRow where a map names a key that none of a row's turns has: misspelt, it would be left out silently."""
    turns = [turn for value in columns.values() if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    held = {key for turn in turns for key in turn}
    for ours, theirs in keys.items():
        if turns and ours not in held:
            raise BadRow(
                theirs, f"`columns.{ours}` names a key that no turn has", f"the turns' are {listed(sorted(held))}"
            )


def check_columns_map(source: DatasetSource) -> None:
    """Refuse a ``columns`` map whose left side isn't one of the schema's names."""
    known = (*SCHEMA_COLUMNS, *TURN_KEYS)
    for name in source.columns:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(known)}"
            raise DataError(f"{source.path}: `columns.{name}` is not a name of the schema; {hint}")


def format_of(source: DatasetSource, first: RawRow, kind: Kind, *, place: str | None = None) -> Format:
    """The source's format: as the recipe says, or recognised from its first row. Checks that it suits `kind`.

    Raises DataError naming the source, or the row's `place` (file:row), where no format is recognised, or the format
    holds another kind of data; BadRow where the row is empty, or null where the format would show: another may tell.
    """
    check_columns_map(source)
    row = rename(first, source) if source.columns or source.roles else first
    found = source.format or recognise(row)
    if found is None or kind not in KINDS_OF[found]:
        _refuse_nulls(row)
    if found is None:
        raise DataError(f"{place or source.path}: {_unrecognised(row, kind)}")
    chats_as_text = kind == "text" and source.format is not None and "conversation" in KINDS_OF[found]
    if kind not in KINDS_OF[found] and not chats_as_text:
        raise DataError(f"{place or source.path}: {_wrong_kind(row, found, kind)}")
    if source.format is None and (problem := _half_recognised(row, found)):
        raise DataError(f"{place or source.path}: {problem}")
    return found


def _refuse_nulls(row: RawRow) -> None:
    if not row:
        raise BadRow("columns", "the row has none", "take it out")
    for name in _TELLING:
        if name in row and row[name] is None:
            raise BadRow(name, "is null", "write it, or take the row out")


def _unrecognised(row: RawRow, kind: Kind) -> str:
    shown = _demonstrations(row)
    if len(shown) > 1:
        formats = " or ".join(f"`format: {name}`" for name in shown)
        if row.get("label") is not None or row.get("kto_tag") is not None:
            formats = " or ".join(_naming(_DEMONSTRATIONS[name]) for name in shown)
        return f"the columns {listed(row)} hold more than one conversation; say {formats}"
    if known := refused(row):
        return f"the columns {listed(row)} hold {known[0]}; {known[1]}"
    written = suggestion(row, kind)
    mend = f"say {written}" if written else f"this stage needs {NEEDED[kind]}: say `format` and `columns`"
    return f"no format has the columns {listed(row)}; {mend}"


def _naming(columns: set[str]) -> str:
    return f"`columns: {{{', '.join(f'{name}: {name}' for name in sorted(columns, reverse=True))}}}`"


def _wrong_kind(row: RawRow, found: Format, kind: Kind) -> str:
    others = _demonstrations(row)
    if others and (row.get("label") is not None or row.get("kto_tag") is not None):
        others.append("unpaired")
    others += [name for name in _ONE_COLUMN if row.get(name) is not None]
    fitting = next((name for name in others if kind in KINDS_OF[name]), None)
    if fitting is None and (known := refused(row)):
        return f"the columns {listed(row)} hold {known[0]}; {known[1]}"
    written = f"`format: {fitting}`" if fitting else suggestion(row, kind) or "`format` and `columns`"
    return (
        f"this stage needs {NEEDED[kind]}, and the file holds {found} rows "
        f"(columns {listed(row)}); give another file, or say {written}"
    )


def _half_recognised(row: RawRow, found: Format) -> str | None:
    """What a recognised format leaves open, with the key that settles it."""
    if found == "alpaca" and row.get("corrected") is not None:
        return "`output` and `corrected` may each be the reply; say `columns: {output: corrected}` or `format: alpaca`"
    replies = found == "preference" and isinstance(row["chosen"], str) and not looks_like_turns(row["chosen"])
    if replies and all(row.get(column) is None for column in PROMPT_COLUMNS):
        written = suggestion(row, "preference")
        return f"none of the columns {listed(row)} is the prompt by its name; say {written}" if written else None
    return None


def normalise(raw: RawRow, source: DatasetSource, format_: Format, kind: Kind) -> Row:
    """One row of `format_` as a row of `kind`; raises BadRow (``field: problem → mend``)."""
    row = rename(raw, source) if source.columns or source.roles else raw
    check_value(row if kind == "prompt" else {name: row[name] for name in _READ_COLUMNS if name in row})
    if not _LOST.isdisjoint(row):
        _refuse_lost(row)
    if source.format is None and kind == "conversation" and _has_label(row, [format_]):
        name = "label" if row.get("label") is not None else "kto_tag"
        mend = f"say `format: {format_}` where every reply is to be learned, or take the row out"
        raise BadRow(name, "is about the reply, and the source's first row has none", mend)
    made = _READERS[format_](row)
    if source.system:
        made = _with_system(made, source.system)
    if kind == "text" and isinstance(made, Conversation):
        return _as_document(made)
    return _as_prompt(made, row) if kind == "prompt" else _finished(made)


def _refuse_lost(row: RawRow) -> None:
    """Raise BadRow for columns that change what is learned elsewhere and would be left out here without a word."""
    for name in sorted(_LOST.intersection(row)):
        if name in MEDIA and has_media(row[name]):
            raise BadRow(name, *media_problem(name))
        if name not in MEDIA and row[name]:
            mend = "take the column out, and write what it says into a template (model.chat_template_path)"
            raise BadRow(name, "are a row's own template arguments, which aren't passed on", mend)


_READERS: dict[Format, Callable[[RawRow], Row]] = {
    "messages": readers.read_messages,
    "sharegpt": readers.read_sharegpt,
    "alpaca": readers.read_alpaca,
    "prompt_completion": readers.read_prompt_completion,
    "preference": readers.read_preference,
    "hh": readers.read_hh,
    "unpaired": readers.read_unpaired,
    "text": readers.read_text,
    "prompt": readers.read_prompt,
}


def _with_system(row: Row, system: str) -> Row:
    """The source's ``system`` text before rows that have none."""
    name = "messages" if isinstance(row, Conversation) else "prompt"
    messages: Messages = getattr(row, name, [])
    if isinstance(row, Text) or (messages and messages[0]["role"] == "system"):
        return row
    changes: dict[str, Any] = {name: [{"role": "system", "content": system}, *messages], "raw": False}
    if isinstance(row, Conversation) and row.first_supervised:
        changes["first_supervised"] = row.first_supervised + 1
    return replace(row, **changes)


def _as_document(row: Conversation) -> Text:
    """A conversation as plain text: its turns' contents, one under another."""
    for i, turn in enumerate(row.messages):
        if turn.get("tool_calls"):
            raise BadRow(f"messages[{i}].tool_calls", "have no place in plain text", "take the row out")
    return Text(text="\n".join(turn["content"] for turn in row.messages))


def _as_prompt(row: Row, columns: RawRow) -> Prompt:
    """The prompt of a row of any format: everything before the last reply."""
    if isinstance(row, Conversation):
        last = max((i for i, turn in enumerate(row.messages) if turn["role"] == "user"), default=-1)
        prompt = row.messages[: row.first_supervised or last + 1]
    elif isinstance(row, Text):
        raise BadRow("text", "is a document, not a prompt", "give a `prompt` column")
    else:
        prompt = row.prompt
    check_order(prompt, "prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        ends_with(prompt, "user", "prompt")
    used = {"prompt", "completion", "messages", "conversations", "chosen", "rejected", "instruction", "input", "output"}
    extra = {name: value for name, value in columns.items() if name not in used}
    prompt = _unmarked(prompt) if any("train" in turn for turn in prompt) else prompt
    return Prompt(prompt=prompt, extra=extra, tools=row.tools, raw=row.raw)


def _finished(row: Row) -> Row:
    """The checks that hold for every format, on the whole row."""
    if isinstance(row, Conversation):
        check_order(row.messages, "messages")
        turns = row.messages[row.first_supervised :]
        if not any(turn["role"] == "assistant" and "train" not in turn for turn in turns):
            raise BadRow("messages", "has no assistant turn to learn from", "add the reply")
    elif isinstance(row, Preference):
        _check_replies(row.prompt, {"chosen": row.chosen, "rejected": row.rejected})
        if row.chosen == row.rejected:
            raise BadRow("rejected", "is the same as chosen", "give two different replies, or take the row out")
    elif isinstance(row, Unpaired):
        _check_replies(row.prompt, {"completion": row.completion})
    if isinstance(row, Preference | Unpaired) and any("train" in turn for turn in row.prompt):
        return replace(row, prompt=_unmarked(row.prompt))
    return row


def _unmarked(prompt: Messages) -> Messages:
    """A prompt without the marks of what isn't to be learned: nothing of it is."""
    return [{key: value for key, value in turn.items() if key != "train"} for turn in prompt]


def _check_replies(prompt: Messages, replies: dict[str, Messages]) -> None:
    check_order(prompt, "prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        ends_with(prompt, "user", "prompt")
    for side, turns in replies.items():
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            roles = ", ".join(turn["role"] for turn in turns)
            raise BadRow(side, f"is not one assistant turn ({roles})", "let both sides differ in the last reply only")
        if "train" in turns[0]:
            raise BadRow(side, "is marked as not to be learned", "take the mark out, or the row")
