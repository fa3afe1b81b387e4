"""Token ids to text while they arrive: nothing is shown before its bytes are whole."""

from __future__ import annotations

from typing import Any

_BROKEN = "\ufffd"  # what a tokenizer decodes an unfinished UTF-8 sequence to


class TextStream:
    """Decodes a growing list of ids. A Chinese character or an emoji may take several tokens; it comes out once.

    Only the tokens since the last whole text are decoded again, with the ones before them as context, since many
    tokenizers write a space by what stands before.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # ids[context:shown] were shown last; they are decoded again as context
        self._shown = 0

    def add(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        fresh = self._fresh()
        if not fresh or fresh.endswith(_BROKEN):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return fresh

    def end(self) -> str:
        """What is left where the reply ends inside a character."""
        fresh = self._fresh()
        self._context = self._shown = len(self._ids)
        return fresh

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
