"""Whose token is it? Roles read off prepared ids by the template's own markers, a whole table at a time.

What stands between two turns (``<|im_end|>\\n<|im_start|>assistant\\n``) is found by rendering short conversations of
made-up words, as ids. A marker that holds a special token can't be forged, since chatalign encodes special tokens in
rows as text; a template that marks turns by plain text is said to do so (:attr:`RoleMarkers.by_text`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatalign.data.chat import ChatEncoder
from chatalign.data.rows import Messages, Tools
from chatalign.errors import TemplateError

# `template`: all that the template writes, stop tokens and every other special token too. `text`: documents, and rows
# of strings of which no mask says where the reply begins. `other`: a turn whose start was cut, or is not known here.
ROLES = ("system", "user", "assistant", "tool", "template", "text", "other")
SYSTEM, USER, ASSISTANT, TOOL, TEMPLATE, TEXT, OTHER = range(len(ROLES))
_NUMBER = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
Ids = NDArray[np.int32]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Marker:
    """Ids that stand before a turn of `role` (TEMPLATE: after a conversation); `at_start`: before a row's first turn.

    White space at either end may have merged with a turn's own: `head` and `tail` belong to it where they are there.
    """

    head: tuple[int, ...]
    core: tuple[int, ...]
    tail: tuple[int, ...]
    role: int
    at_start: bool
    by_text: bool


class RoleMarkers:
    """Finds roles in ids. Without an encoder (rows that no template rendered) only special tokens are told apart."""

    def __init__(self, tokenizer: Any, encoder: ChatEncoder | None) -> None:
        special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(special | set(tokenizer.all_special_ids))
        self._is_special = np.zeros(max(len(tokenizer), *self.special_ids, 0) + 1, dtype=bool)
        self._is_special[list(self.special_ids)] = True
        self.markers = _learn(encoder, self.special_ids) if encoder is not None else []

    @property
    def by_text(self) -> bool:
        """Whether some marker is plain text, which a row may hold too."""
        return any(marker.by_text for marker in self.markers)

    def roles(self, ids: Ids, starts: Places, first: int | NDArray[np.int8]) -> NDArray[np.int8]:
        """The role of each of the flat `ids`, int8 [T]; row i begins at `starts[i]`, in the role `first`."""
        ends = np.append(starts[1:], len(ids)).astype(np.int64)
        begin, until, role = [starts], [starts], [np.broadcast_to(np.int8(first), starts.shape)]
        where: dict[int, Places] = {}
        for marker in self.markers:
            from_, to = _matches(marker, ids, starts, ends, where, self.special_ids)
            begin.append(from_)
            until.append(to)
            role.append(np.full(len(from_), marker.role, dtype=np.int8))
        from_, to, roles = np.concatenate(begin), np.concatenate(until), np.concatenate(role)
        covered = np.bincount(from_, minlength=len(ids) + 1) - np.bincount(to, minlength=len(ids) + 1)
        in_marker = np.cumsum(covered[: len(ids)]) > 0
        special = self._is_special[ids]
        if self.markers:  # no row's text holds a special token: one outside the markers begins what is not known here
            strange = np.flatnonzero(special & ~in_marker) + 1
            from_, to = np.append(from_, strange), np.append(to, strange)
            roles = np.append(roles, np.full(len(strange), OTHER, dtype=np.int8))
        # From where a marker ends its role holds; of those that end at one place the longest, and a row's start.
        length = to - from_
        length[: len(starts)] = len(ids) + 1
        order = np.lexsort((length, to))
        made = np.repeat(roles[order], np.diff(np.append(to[order], len(ids))))
        made[in_marker | special] = TEMPLATE
        return made


def _matches(
    marker: Marker, ids: Ids, starts: Places, ends: Places, where: dict[int, Places], special: frozenset[int]
) -> tuple[Places, Places]:
    """Where the marker stands in `ids`: from, to. `where` keeps the places of the ids that were looked for."""
    core = marker.core
    if marker.at_start:
        found = starts
    else:
        anchor = next((i for i, id_ in enumerate(core) if id_ in special), 0)
        if core[anchor] not in where:
            where[core[anchor]] = np.flatnonzero(ids == core[anchor])
        found = where[core[anchor]] - anchor
        found = found[found >= 0]
    row = np.searchsorted(starts, found, side="right") - 1
    inside = found + len(core) <= ends[row]
    found, row = found[inside], row[inside]
    for i, id_ in enumerate(core):
        same = ids[found + i] == id_
        found, row = found[same], row[same]
    from_, to = found.copy(), found + len(core)
    for step, extra in ((1, marker.tail), (-1, marker.head[::-1])):
        still = np.ones(len(found), dtype=bool)
        for id_ in extra:
            at = to if step == 1 else from_ - 1
            still &= (at >= starts[row]) & (at < ends[row])
            still[still] = ids[at[still]] == id_
            (to if step == 1 else from_)[still] += step
    return from_, to


def _learn(encoder: ChatEncoder, special: frozenset[int]) -> list[Marker]:
    markers: dict[tuple[tuple[int, ...], bool], Marker] = {}
    for messages, tools in _probes():
        for marker in _markers_of(encoder, messages, tools, special):
            markers.setdefault((marker.core, marker.at_start), marker)  # a tool's turn marked as a user's is a user's
    return list(markers.values())


def _probes() -> Iterator[tuple[Messages, Tools | None]]:
    """Conversations in which every turn follows every other that it may follow; contents are words of their own."""
    tool = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}
    shapes = ("user assistant user assistant", "system user assistant user assistant", "user assistant")
    calls = ("user call tool tool assistant user assistant", "system user call tool user assistant")
    for shape in (*shapes, *calls):
        messages: Messages = []
        for i, role in enumerate(shape.split()):
            message: dict[str, Any] = {"role": "assistant" if role == "call" else role, "content": f"Slot{i}Zq7"}
            if role == "call":
                message["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
            if role == "tool":
                message["name"] = "f"
            messages.append(message)
        yield messages, [tool] if shape in calls else None


def _markers_of(
    encoder: ChatEncoder, messages: Messages, tools: Tools | None, special: frozenset[int]
) -> Iterator[Marker]:
    tools_given = tools is not None
    adapted, tools, _ = encoder.template.adapt(messages, tools=tools)
    try:
        text = encoder.template.render(adapted, tools=tools)
    except TemplateError:
        return  # a template without tools or a system turn: no row has them either
    encoding = encoder.text.encode([text])[0]
    at = 0
    for message in [*messages, None]:
        slot = message["content"] if message else ""
        place = text.find(slot, at) if message else len(text)
        if place < 0:
            return  # the template leaves a turn out; what stood before it was learnt
        tokens = [i for i, (a, b) in enumerate(encoding.offsets) if at <= a < b <= place]
        ids = [encoding.ids[i] for i in tokens]
        blank = [not text[slice(*encoding.offsets[i])].strip() for i in tokens]
        by_text = special.isdisjoint(ids)
        # What stands first holds this probe's tools, and plain text between tools' results is a row's as likely.
        if not (tools_given and (at == 0 or by_text)) and not all(blank):
            yield _marker(ids, blank, _NUMBER[message["role"]] if message else TEMPLATE, at == 0, special)
        at = place + len(slot)


def _marker(ids: Sequence[int], blank: Sequence[bool], role: int, at_start: bool, special: frozenset[int]) -> Marker:
    """The marker in what the template writes before a turn; before its first special token the turn before goes on."""
    by_text = special.isdisjoint(ids)
    first = 0 if by_text or at_start else next(i for i, id_ in enumerate(ids) if id_ in special)
    solid = [i for i in range(first, len(ids)) if not blank[i]]
    start, stop = first if at_start else solid[0], solid[-1] + 1
    return Marker(
        head=tuple(ids[first:start]),
        core=tuple(ids[start:stop]),
        tail=tuple(ids[stop:]),
        role=role,
        at_start=at_start,
        by_text=by_text and not at_start,
    )
