"""Which format a row is in, by its columns, and rows of every format brought to the one schema.

Nothing is guessed from names that could mean several things (question/answer, prompt/response): those need the
source's ``columns`` map, and the error says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from chatalign.data import readers
from chatalign.data.readers import RawRow
from chatalign.data.rows import BadRow, Conversation, Kind, Messages, Preference, Prompt, Row, Text, Unpaired
from chatalign.data.turns import check_order, ends_with
from chatalign.errors import DataError
from chatalign.recipe import DatasetSource
from chatalign.recipe.sections import Format

SCHEMA_COLUMNS = (
    *("messages", "conversations", "tools", "system", "prompt", "completion", "chosen", "rejected", "label", "text"),
    *("instruction", "input", "output", "history"),
)
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
# Column pairs that mean a prompt and its reply in many files, offered in errors and never assumed.
_OFTEN = [("question", "answer"), ("prompt", "response"), ("query", "response"), ("instruction", "response")]
_OFTEN += [("problem", "solution"), ("input", "output"), ("prompt", "chosen"), ("question", "response")]


def recognise(row: RawRow) -> Format | None:
    """The format of a row by the columns that hold something; None where no format has these columns."""
    has = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        texts = [row["chosen"], row["rejected"]]
        if all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in texts):
            return "hh"
        return "preference"
    if "label" in has and ("messages" in has or {"prompt", "completion"} <= has or "conversations" in has):
        return "unpaired"
    if "messages" in has:
        return "messages"
    if "conversations" in has:
        return "sharegpt"
    if {"instruction", "output"} <= has:
        return "alpaca"
    if {"prompt", "completion"} <= has:
        return "prompt_completion"
    if "text" in has:
        return "text"
    return "prompt" if "prompt" in has else None


def rename(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    """The row with the schema's names in place of the file's; a column that isn't there is a BadRow."""
    if not columns:
        return row
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    for schema_name, file_name in columns.items():
        if file_name not in row:
            near = get_close_matches(file_name, list(row), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"the row's columns are {_names(row)}"
            raise BadRow(file_name, f"`columns.{schema_name}` names a column that isn't there", hint)
        renamed[schema_name] = row[file_name]
    return renamed


def check_columns_map(source: DatasetSource) -> None:
    """Refuse a ``columns`` map whose left side isn't one of the schema's names."""
    for name in source.columns:
        if name not in SCHEMA_COLUMNS:
            near = get_close_matches(name, SCHEMA_COLUMNS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(SCHEMA_COLUMNS)}"
            raise DataError(f"{source.path}: `columns.{name}` is not a name of the schema; {hint}")


def format_of(source: DatasetSource, first: RawRow, kind: Kind) -> Format:
    """The source's format: as the recipe says, or recognised from its first row. Checks that it suits `kind`.

    Raises DataError naming the source where no format is recognised, or the format holds another kind of data.
    """
    check_columns_map(source)
    renamed = rename(first, source.columns)
    found = source.format or recognise(renamed)
    if found is None:
        raise DataError(f"{source.path}: no format has the columns {_names(renamed)}; {_mapping_hint(renamed, kind)}")
    if kind not in KINDS_OF[found]:
        raise DataError(
            f"{source.path}: this stage needs {NEEDED[kind]}, and the file holds {found} rows "
            f"(columns {_names(renamed)}); give another file, or say `format` and `columns`"
        )
    return found


def _mapping_hint(row: RawRow, kind: Kind) -> str:
    for prompt, completion in _OFTEN:
        if prompt in row and completion in row:
            return f"say `columns: {{prompt: {prompt}, completion: {completion}}}`"
    return f"this stage needs {NEEDED[kind]}: say `format` and `columns`"


def normalise(raw: RawRow, source: DatasetSource, format_: Format, kind: Kind) -> Row:
    """One row of `format_` as a row of `kind`; raises BadRow (``field: problem → mend``)."""
    row = rename(raw, source.columns)
    made = _READERS[format_](row)
    if source.system:
        made = _with_system(made, source.system)
    return _as_prompt(made, row) if kind == "prompt" else _finished(made)


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
    return Prompt(prompt=prompt, extra=extra, tools=row.tools, raw=row.raw)


def _finished(row: Row) -> Row:
    """The checks that hold for every format, on the whole row."""
    if isinstance(row, Conversation):
        check_order(row.messages, "messages")
        if not any(turn["role"] == "assistant" for turn in row.messages[row.first_supervised :]):
            raise BadRow("messages", "has no assistant turn to learn from", "add the reply")
    elif isinstance(row, Preference):
        _check_replies(row.prompt, {"chosen": row.chosen, "rejected": row.rejected})
        if row.chosen == row.rejected:
            raise BadRow("rejected", "is the same as chosen", "give two different replies, or take the row out")
    elif isinstance(row, Unpaired):
        _check_replies(row.prompt, {"completion": row.completion})
    return row


def _check_replies(prompt: Messages, replies: dict[str, Messages]) -> None:
    check_order(prompt, "prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        ends_with(prompt, "user", "prompt")
    for side, turns in replies.items():
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            roles = ", ".join(turn["role"] for turn in turns)
            raise BadRow(side, f"is not one assistant turn ({roles})", "let both sides differ in the last reply only")


def _names(row: RawRow) -> str:
    return ", ".join(f"`{name}`" for name in row)
