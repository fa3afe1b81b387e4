"""What becomes of rows that are longer than the recipe allows. Every function here is pure: ids in, ids out.

Demonstrations keep their start, preferences and prompts the end of the prompt: what the reply answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chatalign.data.chat import Encoded, EncodedPair
from chatalign.errors import GuardError

OnOverlong = Literal["truncate", "drop", "error"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row left out for its length, with what it is counted by. `lost_target`: cut short, nothing was to learn."""

    reason: str
    lost_target: bool = False


def fit_conversation(encoded: Encoded, max_length: int, on_overlong: OnOverlong) -> Encoded | Dropped:
    """The first `max_length` tokens; Dropped where no target is among them (the first token is never one)."""
    if len(encoded.ids) <= max_length:
        return encoded
    if on_overlong != "truncate":
        return Dropped(f"longer than max_length ({max_length})")
    supervised = encoded.supervised[:max_length]
    if not any(supervised[1:]):
        return Dropped(f"no target within max_length ({max_length})", lost_target=True)
    spans = tuple((first, min(last, max_length)) for first, last in encoded.spans if first < max_length)
    return Encoded(encoded.ids[:max_length], supervised, spans)


def fit_prompt(ids: list[int], max_prompt_length: int | None, on_overlong: OnOverlong) -> list[int] | Dropped:
    """The last `max_prompt_length` tokens of a prompt."""
    if max_prompt_length is None or len(ids) <= max_prompt_length:
        return ids
    if on_overlong != "truncate":
        return Dropped(f"prompt longer than max_prompt_length ({max_prompt_length})")
    return ids[-max_prompt_length:]


def fit_pair(
    pair: EncodedPair, max_length: int, max_prompt_length: int | None, on_overlong: OnOverlong
) -> EncodedPair | Dropped:
    """A pair whose prompt and longer reply have at most `max_length` tokens together.

    The prompt is cut from its left first, to no less than half of `max_length`; then the replies' ends. Both sides
    keep a token, and pairs that are equal after the cut are dropped: their loss would be ln 2 for ever.
    """
    prompt = fit_prompt(pair.prompt_ids, max_prompt_length, on_overlong)
    if isinstance(prompt, Dropped):
        return prompt
    longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
    if len(prompt) + longest > max_length:
        if on_overlong != "truncate":
            return Dropped(f"longer than max_length ({max_length})")
        prompt = prompt[-max(max_length - longest, max_length // 2) :]
    room = max_length - len(prompt)
    chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
    if chosen == rejected:
        return Dropped(f"chosen and rejected are the same within max_length ({max_length})", lost_target=True)
    return EncodedPair(prompt, chosen, rejected)


def refuse_without_targets(fitted: Encoded, max_length: int) -> None:
    """Raise GuardError where a row that is kept has nothing to learn: its loss would be 0, or the mean of nothing."""
    if 1 not in fitted.supervised:
        raise GuardError(
            f"data.max_length {max_length}: a row was kept of which no token is a target; "
            f"raise it, or leave long rows out with data.on_overlong: drop"
        )


def refuse_emptied(before: EncodedPair, after: EncodedPair, max_length: int) -> None:
    """Raise GuardError where a cut took a whole reply, or the end of the prompt, which the replies answer."""
    for side, ids, left in (
        ("prompt", before.prompt_ids, after.prompt_ids),
        ("chosen reply", before.chosen_ids, after.chosen_ids),
        ("rejected reply", before.rejected_ids, after.rejected_ids),
    ):
        if (ids and not left) or (side == "prompt" and ids[-len(left) :] != left):
            lost = "every token" if not left else "the end"
            raise GuardError(
                f"data.max_length {max_length}: the cut took {lost} of a {side}; "
                f"raise it, or leave long rows out with data.on_overlong: drop"
            )


def cut_document(ids: list[int], max_length: int) -> list[list[int]]:
    """A document in pieces of at most `max_length` tokens; a last piece of one token teaches nothing and is left."""
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [piece for piece in pieces if len(piece) > 1]
