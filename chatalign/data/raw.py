"""Rows as plain text: prompt and completion end to end, documents with EOS after each; no chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatalign.data.chat import SAME_REPLIES_MEND, Encoded, EncodedPair, Supervise
from chatalign.data.rows import BadRow, Conversation, Preference
from chatalign.data.tokens import TextEncoder
from chatalign.errors import ModelError


class RawEncoder:
    """Encodes plain text. BOS comes first where the tokenizer puts one before plain text; EOS ends completions.

    `parse_special`: special tokens in prompts and completions are taken as such, for rows that already hold a
    template's text. Documents' are always text: nobody writes an end of document into a document.
    """

    def __init__(self, tokenizer: Any, *, parse_special: bool, eos_for_text: bool = True) -> None:
        self.text = TextEncoder(tokenizer)
        self.tokenizer = tokenizer
        self.parse_special = parse_special
        self.eos_for_text = eos_for_text

    @property
    def eos(self) -> int:
        """The EOS id; raises ModelError where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no EOS token, so no reply can end; set eos_token in its config")
        return int(self.tokenizer.eos_token_id)

    def ids(self, text: str) -> list[int]:
        """The ids of a prompt or completion."""
        if self.parse_special or not self.text.has_special(text):
            return self.text.ids(text)
        return self.text.ids(self.text.guard(text), guarded=True)

    def prompt(self, text: str) -> list[int]:
        """BOS where the tokenizer has one, and the text."""
        ids = self.ids(text)
        return ids if ids[: len(self.text.bos)] == self.text.bos else [*self.text.bos, *ids]

    def conversation(self, row: Conversation, supervise: Supervise) -> Encoded:
        """Prompt, completion and EOS; targets are the completion and EOS, or everything with ``supervise: all``."""
        prompt = self.prompt(row.messages[0]["content"])
        completion = [*self.ids(row.messages[1]["content"]), self.eos]
        ids = [*prompt, *completion]
        marks = [int(supervise == "all")] * len(prompt) + [1] * len(completion)
        return Encoded(ids, marks, ((len(prompt), len(ids)),))

    def pair(self, row: Preference) -> EncodedPair | BadRow:
        """A preference with EOS after both replies; a BadRow where the tokenizer reads both alike."""
        chosen, rejected = ([*self.ids(side[0]["content"]), self.eos] for side in (row.chosen, row.rejected))
        if chosen == rejected:
            return BadRow("rejected", "is the same as chosen to the tokenizer", SAME_REPLIES_MEND)
        return EncodedPair(self.prompt(row.prompt[0]["content"]), chosen, rejected)

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each document's ids, BOS first where the tokenizer has one, EOS last where asked for."""
        forged = [self.text.has_special(text) for text in texts]
        clean = iter(self.text.encode([text for text, bad in zip(texts, forged, strict=True) if not bad]))
        end = [self.eos] if self.eos_for_text else []
        made = []
        for text, bad in zip(texts, forged, strict=True):
            ids = self.text.ids(self.text.guard(text), guarded=True) if bad else next(clean).ids
            made.append([*self.text.bos, *ids, *end])
        return made
