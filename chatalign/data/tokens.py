"""Text to token ids through a fast tokenizer, with control tokens only where the template wrote them.

Whoever writes ``<|im_end|>`` into a message must not end a turn by it. Before rendering, every special token's text
inside users' strings is swapped for a *ward*, private-use characters of the same length; after rendering, each
special token that is still there comes from the template. Then wards become the original text again, the template's
own special tokens become *nonces*, and a copy of the tokenizer, which knows its special tokens by the nonces only,
encodes the whole: exactly as the tokenizer itself would, but for the forged tokens, which are text. Rows without a
forged token (nearly all) go straight through the tokenizer, or through a memo of its words (``data.words``).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer

from chatalign.data.words import WordMemo, word_memo
from chatalign.errors import TemplateError

Spans = Sequence[tuple[int, int]]
_MEMO_TEXTS = 200  # fewer texts at once don't repay making the memo
_WARDS, _NONCES = 0xF0000, 0x100000  # Unicode's private-use planes 15 and 16


class TextEncoder:
    """Encodes rendered text for one tokenizer; see the module's head."""

    def __init__(self, tokenizer: Any, control: Collection[str] = ()) -> None:
        """`control` are added tokens that mark turns although the tokenizer doesn't call them special (Command R's).

        Raises TemplateError for a tokenizer that is not a fast one (no character offsets).
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TemplateError("the tokenizer is not a fast one, so tokens have no offsets; give a tokenizer.json")
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special_ids: dict[str, int] = {
            token.content: id_ for id_, token in added.items() if token.special or token.content in control
        }
        for text in tokenizer.all_special_tokens:
            self.special_ids.setdefault(text, tokenizer.convert_tokens_to_ids(text))
        self.added_texts = sorted({token.content for token in added.values()} | set(self.special_ids), key=len)[::-1]
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._wards = {text: _ward(text) for text in longest_first}
        self._nonces = {text: _nonce(len(text)) for text in longest_first}
        swaps = {**self._nonces, **{ward: text for text, ward in self._wards.items()}}
        self._swaps = swaps
        self._memo: WordMemo | None = None
        self._either = re.compile("|".join(map(re.escape, [*longest_first, *self._wards.values()])) or r"(?!)")

    def has_special(self, value: Any) -> bool:
        """Whether any string inside `value` (text, lists, mappings) holds a special token's text."""
        if isinstance(value, str):
            return self._special.search(value) is not None or self._becomes_special(value)
        if isinstance(value, dict):
            return any(map(self.has_special, value)) or any(map(self.has_special, value.values()))
        return isinstance(value, list | tuple) and any(map(self.has_special, value))

    def special_at_start(self, text: str) -> str:
        """The special token that rendered text starts with, or nothing."""
        return next((token for token in self.special_ids if text.startswith(token)), "")

    def special_at_end(self, text: str) -> str:
        """The special token that rendered text ends with, or nothing."""
        return next((token for token in self.special_ids if text.endswith(token)), "")

    def _becomes_special(self, text: str) -> bool:
        """Whether the tokenizer's normalizer makes a special token of other characters (＜|im_end|＞ by NFKC)."""
        return self._normalizer is not None and self._special.search(self._normalizer.normalize_str(text)) is not None

    @cached_property
    def _normalizer(self) -> Any:
        """The normalizer, where special tokens are looked for in what it makes; else None."""
        looked_for = any(
            token.normalized
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.content in self.special_ids
        )
        return self.tokenizer.backend_tokenizer.normalizer if looked_for else None

    def guard(self, value: Any) -> Any:
        """`value` with each special token's text swapped for its ward, at the same length."""
        if isinstance(value, str):
            return self._special.sub(lambda match: self._wards[match[0]], value)
        if isinstance(value, dict):
            return {self.guard(key): self.guard(inner) for key, inner in value.items()}
        return [self.guard(inner) for inner in value] if isinstance(value, list | tuple) else value

    def unguard(self, text: str) -> str:
        """Rendered text as the user's words had it."""
        for special, ward in self._wards.items():
            text = text.replace(ward, special)
        return text

    def encode(self, texts: Sequence[str], *, guarded: bool = False) -> list[Encoding]:
        """Token ids with offsets; no BOS or EOS is added. `guarded` texts hold wards for forged tokens."""
        if guarded:
            return self._blind.encode_batch([self._swap(text) for text in texts], add_special_tokens=False)
        return self._plain.encode_batch(list(texts), add_special_tokens=False)

    def ids(self, text: str, *, guarded: bool = False) -> list[int]:
        """The ids of one text."""
        found = self._memo.encode(text) if self._memo is not None and not guarded else None
        return self.encode([text], guarded=guarded)[0].ids if found is None else found[0]

    def encode_spans(
        self, texts: Sequence[tuple[str, bool]], spans: Sequence[Spans] | None = None
    ) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        """For each (text, whether it is guarded) its ids, and the tokens (first, last + 1) of its spans of characters.

        None stands for the tokens where one crosses the start of a span. A batch: the guarded texts and the others
        that the memo can't take are each one call of the tokenizer.
        """
        spans = spans or [()] * len(texts)
        made: list[Any] = [None] * len(texts)
        if len(texts) >= _MEMO_TEXTS:
            self.learn_words()
        if self._memo is not None:
            made = [
                None if guarded else _from_memo(self._memo, text, wanted)
                for (text, guarded), wanted in zip(texts, spans, strict=True)
            ]
        for is_guarded in (False, True):
            rest = [i for i, found in enumerate(made) if found is None and texts[i][1] == is_guarded]
            encodings = self.encode([texts[i][0] for i in rest], guarded=is_guarded) if rest else []
            for i, encoding in zip(rest, encodings, strict=True):
                made[i] = (encoding.ids, _token_spans(encoding, spans[i]))
        return made

    def learn_words(self) -> None:
        """Make the memo of words, where the tokenizer allows one; later calls cost nothing."""
        self._memo = self._new_memo

    def _swap(self, text: str) -> str:
        return self._either.sub(lambda match: self._swaps[match[0]], text)

    @cached_property
    def bos(self) -> list[int]:
        """The BOS token, where the tokenizer itself puts one before plain text; else nothing."""
        ids = self.tokenizer("a")["input_ids"]
        return [ids[0]] if ids and ids[0] == self.tokenizer.bos_token_id else []

    @cached_property
    def splits_anywhere(self) -> bool:
        """Whether tokens don't depend on what stands before the text (no SentencePiece dummy prefix)."""
        for text in ("Hello", "你好", " Hello", "\n\nHi", "1"):
            for before in ("x\n", "x:"):
                if self.ids(before + text) != self.ids(before) + self.ids(text) and not text[0].isspace():
                    return False
        return True

    @cached_property
    def _new_memo(self) -> WordMemo | None:
        return word_memo(self._plain)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer's backend; a copy where its state would cut, pad, or trim spaces off the offsets."""
        backend = self.tokenizer.backend_tokenizer
        trims = backend.post_processor is not None and b'"trim_offsets":true' in backend.post_processor.__getstate__()
        if backend.padding is None and backend.truncation is None and not trims:
            return backend
        state = json.loads(backend.to_str())
        state.update(post_processor=None, padding=None, truncation=None)
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _blind(self) -> Tokenizer:
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = self._nonces
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(text, text): id_ for text, id_ in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        state.update(post_processor=None, padding=None, truncation=None)
        blind = Tokenizer.from_str(json.dumps(state))
        for text, nonce in names.items():
            if blind.encode(nonce, add_special_tokens=False).ids != [self.special_ids[text]]:
                raise TemplateError(f"special token {text!r} can't be told from its own text in this tokenizer")
        return blind


def _from_memo(memo: WordMemo, text: str, spans: Spans) -> tuple[list[int], list[tuple[int, int]]] | None:
    found = memo.encode(text, [place for span in spans for place in span])
    if found is None:
        return None
    ids, before = found
    return ids, list(zip(before[::2], before[1::2], strict=True))


def _token_spans(encoding: Encoding, spans: Spans) -> list[tuple[int, int]] | None:
    made = []
    for start, end in spans:
        first, last, crosses = token_span(encoding, start, end)
        if crosses:
            return None
        made.append((first, last))
    return made


def token_span(encoding: Encoding, start: int, end: int) -> tuple[int, int, bool]:
    """Tokens of the characters start..end, and whether a token crosses the start.

    A token may reach past `end`: some stop tokens take the white space after them along (``rstrip``).
    """
    quick = encoding.char_to_token(start), encoding.char_to_token(end)
    if quick[0] is not None and quick[1]:
        before, behind = encoding.token_to_chars(quick[1] - 1), encoding.token_to_chars(quick[1])
        at = encoding.token_to_chars(quick[0])
        if at and before and behind and before[0] < end == behind[0]:
            return quick[0], quick[1], at[0] < start
    offsets = encoding.offsets  # far more work than the lookups, which find no token in white space that was dropped
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    last = bisect_left(offsets, end, key=lambda offset: offset[0])
    return first, last, first < len(offsets) and offsets[first][0] < start


def _ward(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest() * (len(text) // 16 + 1)
    pairs = (digest[2 * i] * 256 + digest[2 * i + 1] for i in range(len(text)))
    return "".join(chr(_WARDS + pair % 0xFFFE) for pair in pairs)


def _nonce(length: int) -> str:
    # Unguessable, so that nobody can write one into a row; it never leaves this process.
    return "".join(chr(_NONCES + secrets.randbelow(0xFFFE)) for _ in range(length))
