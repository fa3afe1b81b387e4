"""A conversation with a model: its turns, its settings, what fits into the context, and replies as they stream."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from chatalign.chat.text_stream import TextStream
from chatalign.data.chat import encode_prompt
from chatalign.data.rows import Messages
from chatalign.errors import DataError
from chatalign.rollout import Sampling, stream_reply

# A reply needs room: old turns go until this share of the context, or max_new_tokens if that is less, is free.
_ROOM = 4


@dataclass(kw_only=True)
class Conversation:
    """Turns so far, and how replies are drawn. `context` is the longest prompt and reply together, in tokens."""

    model: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    context: int | None
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    system: str | None = None
    turns: Messages = field(default_factory=list)

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns = []

    def make_room(self) -> int:
        """Drop the oldest exchanges until a reply fits; returns how many turns went.

        Raises DataError where the newest message alone is too long; it is dropped then.
        """
        if self.context is None:
            return 0
        room = min(self.max_new_tokens, max(self.context // _ROOM, 1))
        dropped = 0
        while (length := len(self.prompt_ids())) + room > self.context:
            if len(self.turns) == 1:
                self.turns = []
                raise DataError(
                    f"your message takes {length} tokens with the system message, and the model reads "
                    f"{self.context} with {room} kept for its reply; write less"
                )
            del self.turns[:2]  # a question and its reply
            dropped += 2
        return dropped

    def prompt_ids(self) -> list[int]:
        """What the model is served: the system message, the turns, the generation prompt."""
        system: Messages = [{"role": "system", "content": self.system}] if self.system else []
        return encode_prompt([*system, *self.turns], self.tokenizer)

    def stream(self) -> Generator[str, None, None]:
        """The reply to the last turn, piece by piece; it becomes a turn when it ends or is broken off."""
        ids = self.prompt_ids()
        longest = self.max_new_tokens if self.context is None else min(self.max_new_tokens, self.context - len(ids))
        sampling = Sampling(
            max_new_tokens=longest,
            stop_token_ids=self.stop_token_ids,
            temperature=self.temperature,
            top_p=self.top_p,
            forbidden_token_ids=(self.tokenizer.pad_token_id,),
            seed=self.seed + len(self.turns),
        )
        text = TextStream(self.tokenizer)
        said: list[str] = []
        try:
            for token_id in stream_reply(self.model, self.tokenizer, ids, sampling):
                if token_id not in self.stop_token_ids and (piece := text.add(token_id)):
                    said.append(piece)
                    yield piece
            if piece := text.end():
                said.append(piece)
                yield piece
        finally:
            self.turns.append({"role": "assistant", "content": "".join(said)})
