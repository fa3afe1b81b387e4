"""Rows of the schema to the columns that trainers read.

conversation, text: ``input_ids``, ``supervised`` (1 where the token is a target)
preference:         ``prompt_ids``, ``chosen_ids``, ``rejected_ids``
unpaired:           ``prompt_ids``, ``completion_ids``, ``label``
prompt:             ``prompt_ids`` (with generation prompt), ``prompt`` (messages as JSON), ``extra`` (JSON)

Beside them stand each row's origin: ``place`` (file:row) and ``full_length`` (tokens before a cut; of a pair, those
of the prompt and the longer reply; of a document, the piece's own). Training doesn't see these two.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow

from chatalign.data.chat import VERIFIED_ROWS, ChatEncoder, Encoded, EncodedPair, chat_encoder
from chatalign.data.lengths import (
    Dropped,
    cut_document,
    fit_conversation,
    fit_pair,
    fit_prompt,
    refuse_emptied,
    refuse_without_targets,
)
from chatalign.data.raw import RawEncoder
from chatalign.data.rows import BadRow, Conversation, Kind, Messages, Preference, Prompt, Row, Text, Unpaired
from chatalign.errors import TemplateError
from chatalign.recipe import DataSection

Columns = dict[str, Any]
_IDS = datasets.List(datasets.Value("int32"))
FEATURES: dict[Kind, dict[str, Any]] = {
    "conversation": {"input_ids": _IDS, "supervised": datasets.List(datasets.Value("int8"))},
    "text": {"input_ids": _IDS, "supervised": datasets.List(datasets.Value("int8"))},
    "preference": {"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS},
    "unpaired": {"prompt_ids": _IDS, "completion_ids": _IDS, "label": datasets.Value("bool")},
    "prompt": {"prompt_ids": _IDS, "prompt": datasets.Value("string"), "extra": datasets.Value("string")},
}
ORIGIN = {"place": datasets.Value("string"), "full_length": datasets.Value("int32")}


Outcome = int | BadRow | Dropped  # how many rows of a table a row became, or why none


@dataclass(frozen=True, slots=True)
class Block:
    """Encoded rows, and the outcome of each row that was given."""

    outcomes: list[Outcome]
    table: pyarrow.Table


def table_schema(kind: Kind) -> pyarrow.Schema:
    """The columns of a kind, with datasets' own types in the metadata."""
    return datasets.Features(FEATURES[kind] | ORIGIN).arrow_schema


def _column(rows: Sequence[Columns], field: pyarrow.Field) -> pyarrow.Array:
    values = [row[field.name] for row in rows]
    if not pyarrow.types.is_list(field.type):
        return pyarrow.array(values, field.type)
    ends = np.cumsum(np.fromiter(map(len, values), np.int32, len(values)), dtype=np.int32)
    flat = array("i" if field.type.value_type == pyarrow.int32() else "b")
    for row_values in values:
        flat.fromlist(row_values)  # several times as fast as numpy on a list of ints
    offsets = np.concatenate([np.zeros(1, np.int32), ends])
    return pyarrow.ListArray.from_arrays(offsets, np.asarray(flat), type=field.type)


def _turns(row: Row) -> Messages:
    """All turns of a row; of a preference those that were chosen."""
    if isinstance(row, Conversation):
        return row.messages
    if isinstance(row, Preference):
        return [*row.prompt, *row.chosen]
    if isinstance(row, Unpaired):
        return [*row.prompt, *row.completion]
    return [] if isinstance(row, Text) else row.prompt


class RowEncoder:
    """Encodes rows of one kind as a recipe's ``data:`` section says."""

    def __init__(self, section: DataSection, tokenizer: Any, kind: Kind, *, eos_for_text: bool = True) -> None:
        self.section = section
        self.kind = kind
        self.raw = RawEncoder(tokenizer, parse_special=not section.apply_chat_template, eos_for_text=eos_for_text)
        templated = section.apply_chat_template and bool(tokenizer.chat_template) and kind != "text"
        self.chat: ChatEncoder | None = chat_encoder(tokenizer) if templated else None
        if self.chat is not None:
            self.chat.verify_rows = VERIFIED_ROWS

    def learn_words(self) -> None:
        """Make the memo of words now, so that forked workers have it."""
        if self.chat is not None:
            self.chat.text.learn_words()

    def trust(self) -> None:
        """Verify no rows: the process that reads them does, on the first."""
        if self.chat is not None:
            self.chat.verify_rows = 0

    def encode(self, rows: Sequence[Row]) -> list[list[Columns] | BadRow | Dropped]:
        """For each row its columns (usually one dict), or why it is left out."""
        if self.chat is not None and (bad := self.chat.rendered_before([_turns(row) for row in rows])) is not None:
            return [bad for _ in rows]
        if self.kind == "text":
            return [self._text(ids) for ids in self.raw.documents([row.text for row in rows if isinstance(row, Text)])]
        if self.kind == "preference":
            return [self._pair(pair) for pair in self._pairs([row for row in rows if isinstance(row, Preference)])]
        if self.kind == "prompt":
            return self._prompts([row for row in rows if isinstance(row, Prompt)])
        if self.kind == "unpaired":
            return self._unpaired([row for row in rows if isinstance(row, Unpaired)])
        return [self._fit(made) for made in self._conversations([row for row in rows if isinstance(row, Conversation)])]

    def block(self, rows: Sequence[Row], places: Sequence[str]) -> Block:
        """The rows' columns as one table, and what became of each row; `places` are where they stand (file:row)."""
        outcomes: list[Outcome] = []
        made: list[Columns] = []
        for one, place in zip(self.encode(rows), places, strict=True):
            outcomes.append(len(one) if isinstance(one, list) else one)
            made += [columns | {"place": place} for columns in one] if isinstance(one, list) else []
        schema = table_schema(self.kind)
        return Block(outcomes, pyarrow.table([_column(made, field) for field in schema], schema=schema))

    def _conversations(self, rows: Sequence[Conversation]) -> list[list[Encoded] | BadRow]:
        if self.chat is not None:
            return self.chat.conversations(rows, self.section.supervise)
        return [bad or [self.raw.conversation(row, self.section.supervise)] for row, bad in self._only_raw(rows)]

    def _pairs(self, rows: Sequence[Preference]) -> list[EncodedPair | BadRow]:
        if self.chat is not None:
            return self.chat.pairs(rows)
        return [bad or self.raw.pair(row) for row, bad in self._only_raw(rows)]

    def _only_raw(self, rows: Sequence[Any]) -> list[tuple[Any, BadRow | None]]:
        if not self.section.apply_chat_template:
            bad = BadRow("messages", "turns need a chat template", "set data.apply_chat_template: true")
            return [(row, None if row.raw else bad) for row in rows]
        if any(not row.raw for row in rows):
            raise TemplateError(
                "the rows hold turns and the tokenizer has no chat template; give model.chat_template_path"
            )
        return [(row, None) for row in rows]

    def _fit(self, made: list[Encoded] | BadRow) -> list[Columns] | BadRow | Dropped:
        if isinstance(made, BadRow):
            return made
        kept: list[Columns] = []
        dropped: Dropped | None = None
        # Of a conversation that is a row a reply, a later reply may lie beyond the cut: that is a cut of it all.
        full_length = max((len(one.ids) for one in made), default=0)
        for one in made:
            fitted = fit_conversation(one, self.section.max_length, self.section.on_overlong)
            if isinstance(fitted, Dropped):
                dropped = fitted
            else:
                refuse_without_targets(fitted, self.section.max_length)
                columns = {"input_ids": fitted.ids, "supervised": fitted.supervised, "full_length": len(one.ids)}
                kept.append(columns)
        if dropped is None:
            return kept
        if not kept or self.section.on_overlong == "error":
            return dropped
        return [columns | {"full_length": full_length} for columns in kept]

    def _pair(self, pair: EncodedPair | BadRow) -> list[Columns] | BadRow | Dropped:
        if isinstance(pair, BadRow):
            return pair
        section = self.section
        fitted = fit_pair(pair, section.max_length, section.max_prompt_length, section.on_overlong)
        if isinstance(fitted, Dropped):
            return fitted
        refuse_emptied(pair, fitted, section.max_length)
        sides = {"prompt_ids": fitted.prompt_ids, "chosen_ids": fitted.chosen_ids, "rejected_ids": fitted.rejected_ids}
        return [sides | {"full_length": _full_length(pair)}]

    def _unpaired(self, rows: Sequence[Unpaired]) -> list[list[Columns] | BadRow | Dropped]:
        """As a pair with one side: the other side is empty, so no cut can make them equal."""
        section = self.section
        made: list[list[Columns] | BadRow | Dropped] = []
        conversations = [
            Conversation(
                messages=[*row.prompt, *row.completion], first_supervised=len(row.prompt), tools=row.tools, raw=row.raw
            )
            for row in rows
        ]
        if self.chat is not None:
            encoded = self.chat.conversations(conversations, "last_assistant")
        else:
            encoded = [bad or [self.raw.conversation(row, "assistant")] for row, bad in self._only_raw(conversations)]
        for row, one in zip(rows, encoded, strict=True):
            if isinstance(one, BadRow):
                made.append(one)
                continue
            first, last = one[0].spans[-1]
            pair = EncodedPair(one[0].ids[:first], one[0].ids[first:last], [])
            fitted = fit_pair(pair, section.max_length, section.max_prompt_length, section.on_overlong)
            if isinstance(fitted, Dropped):
                made.append(fitted)
            else:
                refuse_emptied(pair, fitted, section.max_length)
                columns = {"prompt_ids": fitted.prompt_ids, "completion_ids": fitted.chosen_ids, "label": row.label}
                made.append([columns | {"full_length": _full_length(pair)}])
        return made

    def _prompts(self, rows: Sequence[Prompt]) -> list[list[Columns] | BadRow | Dropped]:
        limit = self.section.max_prompt_length or self.section.max_length
        made: list[list[Columns] | BadRow | Dropped] = []
        if self.chat is not None:
            encoded = self.chat.prompts([(row.prompt, row.tools) for row in rows])
        else:
            encoded = [bad or self.raw.prompt(row.prompt[0]["content"]) for row, bad in self._only_raw(rows)]
        for row, ids in zip(rows, encoded, strict=True):
            if isinstance(ids, BadRow):
                made.append(ids)
                continue
            fitted = fit_prompt(ids, limit, self.section.on_overlong)
            if isinstance(fitted, Dropped):
                made.append(fitted)
                continue
            prompt = json.dumps(row.prompt, ensure_ascii=False)
            extra = json.dumps(row.extra, ensure_ascii=False, default=str)
            made.append([{"prompt_ids": fitted, "prompt": prompt, "extra": extra, "full_length": len(ids)}])
        return made

    def _text(self, ids: list[int]) -> list[Columns] | Dropped:
        pieces = cut_document(ids, self.section.max_length)
        if not pieces:
            return Dropped("a document of one token")
        return [{"input_ids": piece, "supervised": [1] * len(piece), "full_length": len(piece)} for piece in pieces]


def _full_length(pair: EncodedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
