"""Ids back to text for people: whole characters, every token's bounds, and nothing invisible."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from chatalign.preview.roles import ROLES

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SHOWN_BY_SIGN = {"\n": "⏎\n", "\t": "⇥", "\r": "␍", " ": "·"}
_KEPT = "\ufe0e\ufe0f"  # choose between text and picture of the character before them; they hide nothing
# Not of Unicode's categories for controls and formats, and yet drawn as nothing.
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens that end at a character's end together: nearly always one.

    `special`: a special token. `spelled`: text of a row that spells one, and is none.
    """

    ids: tuple[int, ...]
    text: str
    target: bool
    special: bool
    role: str
    spelled: bool = False

    @property
    def look(self) -> tuple[bool, bool, bool]:
        """What is shown alike."""
        return self.target, self.special, self.spelled


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of shown text; a `sign` stands for what would not be seen (``⏎``, ``U+200B``)."""

    text: str
    sign: bool


class TokenTexts:
    """Cuts ids into pieces for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(special | set(tokenizer.all_special_ids))
        names = sorted(filter(None, (self.added.get(id_) for id_ in self.special_ids)), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._bytes: dict[int, bytes] = {}

    def pieces(self, ids: Sequence[int], targets: Sequence[int], roles: Sequence[int]) -> list[Piece]:
        """The tokens with their text. Those that share a character are one piece, where they are shown alike."""
        made: list[Piece] = []
        marked = [
            (id_, bool(target), id_ in self.special_ids, ROLES[role])
            for id_, target, role in zip(ids, targets, roles, strict=True)
        ]
        for (target, special, role), group in groupby(marked, key=lambda token: token[1:]):
            for some, text in self._whole([id_ for id_, *_ in group]):
                made.append(Piece(some, text, target, special, role))
        return self._mark_spelled(made)

    def _whole(self, ids: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Ids that make whole characters together, with their text; bytes that are none are shown as ``�``."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        waiting: list[int] = []
        text = ""
        for id_ in ids:
            waiting.append(id_)
            text += decoder.decode(self._bytes_of(id_))
            if not decoder.getstate()[0]:
                yield tuple(waiting), text
                waiting, text = [], ""
        if waiting:
            yield tuple(waiting), text + decoder.decode(b"", final=True)

    def _bytes_of(self, id_: int) -> bytes:
        if id_ not in self._bytes:
            self._bytes[id_] = self._find_bytes(id_)
        return self._bytes[id_]

    def _find_bytes(self, id_: int) -> bytes:
        if id_ in self.added:
            return self.added[id_].encode()
        token = self.tokenizer.convert_ids_to_tokens(id_)
        if token is None:
            return f"[no token {id_}]".encode()
        if self._byte_level:
            return bytes(self._byte_level[char] for char in token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    @cached_property
    def _byte_level(self) -> dict[str, int]:
        """Character of a token → byte, for byte-level tokenizers; empty for others."""
        decoder = self.tokenizer.backend_tokenizer.decoder
        if decoder is None or b'"ByteLevel"' not in decoder.__getstate__():
            return {}
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def _mark_spelled(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces, those marked that together spell a special token."""
        made: list[Piece] = []
        for special, group in groupby(pieces, key=lambda piece: piece.special):
            some = list(group)
            text = "".join(piece.text for piece in some)
            spans = [] if special else [match.span() for match in self._names.finditer(text)]
            at = 0
            for piece in some:
                end = at + len(piece.text)
                spelled = any(a < end and at < b for a, b in spans)
                made.append(replace(piece, spelled=True) if spelled else piece)
                at = end
        return made


def segments(text: str, *, spaces: bool = False, also: str = "") -> list[Segment]:
    """`text` with a sign in place of all that can't be seen or would change what is; with `spaces` spaces too.

    Line breaks stay, behind their sign. The characters of `also` are named as well: brackets that mean something.
    """
    made: list[Segment] = []
    for is_sign, group in groupby(((_sign(char, spaces, also), char) for char in text), key=lambda pair: bool(pair[0])):
        pairs = list(group)
        made.append(Segment("".join(sign or char for sign, char in pairs), is_sign))
    return made


def _sign(char: str, spaces: bool, also: str) -> str:
    """What stands for a character, or nothing where it is shown as it is."""
    if char in _SHOWN_BY_SIGN:
        return _SHOWN_BY_SIGN[char] if spaces or char != " " else ""
    if char < "\x7f" and char.isprintable() and char not in also:
        return ""
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp") or char in _BLANK
    odd_space = unicodedata.category(char) == "Zs" and char != "\u3000"
    selector = "\ufe00" <= char <= "\ufe0d" or "\U000e0100" <= char <= "\U000e01ef"
    if char not in _KEPT and (hidden or odd_space or selector or char in also):
        return f"⟨U+{ord(char):04X}⟩"
    return ""
