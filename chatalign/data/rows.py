"""The one schema that every format is brought to, and the error that names a bad row.

Messages are dicts with ``role`` (system, user, assistant, tool), ``content`` (text) and, on assistant turns that
call tools, ``tool_calls``; ``train: False`` is on a demonstration's replies that aren't to be learned. ``raw`` marks
rows whose prompt and completion were plain strings: they can do without a chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from chatalign.errors import DataError

Message = dict[str, Any]
Messages = list[Message]
Tools = list[dict[str, Any]]
Kind = Literal["conversation", "text", "preference", "prompt", "unpaired"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A demonstration. Messages before `first_supervised` are context, whatever their role."""

    messages: Messages
    first_supervised: int = 0
    tools: Tools | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two replies to one prompt, of which the first is preferred; each is one assistant message."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: Tools | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpaired:
    """A reply with a thumb up or down."""

    prompt: Messages
    completion: Messages
    label: bool
    tools: Tools | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a policy answers; `extra` holds the row's other columns, for rewards and evaluation."""

    prompt: Messages
    extra: dict[str, Any]
    tools: Tools | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A document."""

    text: str


Row = Conversation | Preference | Unpaired | Prompt | Text


class BadRow(DataError):
    """One row that can't be trained on. `problem` is what drops are counted by."""

    def __init__(self, field: str, problem: str, mend: str) -> None:
        super().__init__(f"{field}: {problem} → {mend}")
        self.field = field
        self.problem = problem
        self.mend = mend

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str, str]]:
        # Exceptions pickle by their message alone; worker processes send these back.
        return BadRow, (self.field, self.problem, self.mend)

    @property
    def reason(self) -> str:
        """What drops are counted by: field and problem, without the row."""
        return f"{self.field}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Broken:
    """What is wrong with a row that can't be read. `reason` is what drops are counted by, `detail` is this row's."""

    reason: str
    detail: str = ""
    mend: str = "mend or delete this row"


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that can't be read, and where it stands (file:row). As text it is a finished line."""

    place: str
    broken: Broken

    def __str__(self) -> str:
        detail = f" ({self.broken.detail})" if self.broken.detail else ""
        return f"{self.place}: {self.broken.reason}{detail} → {self.broken.mend}"


def kind_of(value: Any) -> str:
    """What stands where something else should: ``missing``, ``a list``, ``an int`` …"""
    if value is None:
        return "missing"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
