"""What a check says: one finding for each thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from chatalign.data.checks import DataLook
from chatalign.errors import ChatalignError

Kind = Literal["conversation", "text", "preference", "prompt", "unpaired"]
Status = Literal["ok", "FAIL", "note"]
LookedAt = dict[tuple[str, Kind], DataLook]  # a data section as JSON and its kind of row → what its rows gave
STAGE_DATA: dict[str, Kind] = {
    "pretrain": "text",
    "sft": "conversation",
    "reward": "preference",
    "dpo": "preference",
    "ppo": "prompt",
    "kto": "unpaired",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `check` is the subject, for machines. `problem` is None where it is right, else the error that a launch would
    raise. `note` is what is worth knowing and no failure, with its mend after an arrow.
    """

    check: str
    what: str
    problem: ChatalignError | None = None
    note: str | None = None

    @property
    def status(self) -> Status:
        """``ok``, ``FAIL`` or ``note``."""
        return "FAIL" if self.problem is not None else "note" if self.note else "ok"

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: check, what, status, problem and mend; the latter two null where all is right."""
        problem, mend = halves(str(self.problem or self.note or ""))
        return {
            "check": self.check,
            "what": self.what,
            "status": self.status,
            "problem": problem or None,
            "mend": mend or None,
        }


def halves(message: str) -> tuple[str, str]:
    """A message of ours as problem and mend: what stands before and after its arrow, else its last semicolon."""
    first, line_break, rest = message.partition("\n")
    for separator in (" → ", "; "):
        problem, found, mend = first.rpartition(separator)
        if found:
            return f"{problem}{line_break}{rest}", mend
    return message, ""
