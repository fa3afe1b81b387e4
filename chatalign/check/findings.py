"""What a check says: one finding for each thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chatalign.errors import ChatalignError

Kind = Literal["conversation", "text", "preference", "prompt", "unpaired"]
LookedAt = dict[tuple[str, Kind], list[str]]  # a data section as JSON and its kind of row → the problems of its rows
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
    """One thing that was checked. `problem` is None where it is right, else the error that a launch would raise."""

    what: str
    problem: ChatalignError | None = None
