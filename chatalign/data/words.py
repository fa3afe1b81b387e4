"""A memo of words in front of byte-level BPE: the tokenizer's own ids at a fraction of its work.

Byte-level BPE (GPT-2, Llama 3, Qwen …) cuts a text at its added tokens, cuts what lies between into words by a
regular expression, and merges each word by itself. So a text's ids are its words' ids, and most words of a file were
met before (Zipf): Python's ``re`` finds the words, a dict gives their ids, and the tokenizer's own model merges only
the new ones. Tokenizers do more (offsets of each character, a string of each token) than training rows need.

The ids are the tokenizer's or nothing: the memo takes texts of characters on which it is known where the expression
cuts (ASCII, Latin letters, punctuation: ``ALPHABET``), only tokenizers of the form above, and only after both gave the
same ids on a text of those characters in every pairing that matters. Everything else goes through the tokenizer.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

# Without ſ, İ and ı, which case-insensitive matching takes for s and i, in some libraries.
_PLACES = [*range(0x250), *range(0x2010, 0x2028), *range(0x2030, 0x205F)]
ALPHABET = "".join(chr(place) for place in _PLACES if chr(place) not in "\u017f\u0130\u0131")
_SPACE = "\t-\r \x85\xa0"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PART = re.compile(r"\\p\{(\w+)\}|\\(.)|(.)", re.DOTALL)
_MAX_WORDS = 1 << 17  # about 20 MB; then the memo starts anew, so that memory doesn't grow with the file
_NEIGHBOURS = "a Z7\n!'\xa0é…"


class _WordIds(dict[str, bytes]):
    """Word → its ids as int32 bytes; a word that isn't there yet is merged by the tokenizer's model."""

    def __init__(self, model: Any, added: dict[str, int]) -> None:
        super().__init__()
        self.model = model
        self.added = {text: array("i", [id_]).tobytes() for text, id_ in added.items()}
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.letters = {ord(char): as_bytes.pre_tokenize_str(char)[0][0] for char in ALPHABET}  # of its bytes
        self.update(self.added)

    def __missing__(self, word: str) -> bytes:
        if len(self) >= _MAX_WORDS:
            self.clear()
            self.update(self.added)
        tokens = self.model.tokenize(word.translate(self.letters))
        self[word] = ids = array("i", [token.id for token in tokens]).tobytes()
        return ids


class WordMemo:
    """Encodes texts word by word; made by :func:`word_memo`."""

    def __init__(self, model: Any, words: re.Pattern[str], added: dict[str, int]) -> None:
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if added else r"((?!))")
        self._words = words
        self._foreign = re.compile(f"[^{re.escape(ALPHABET)}]")
        self._ids = _WordIds(model, added)

    def encode(self, text: str, cuts: Sequence[int] = ()) -> tuple[list[int], list[int]] | None:
        """The ids, and how many of them lie before each of the characters `cuts` (ascending).

        None where the memo can't tell: a character outside ``ALPHABET``, or a cut inside a word.
        """
        if not text.isascii() and self._foreign.search(text):
            return None
        words: list[str] = []
        before: list[int] = []  # words before each cut
        at = 0
        for i, piece in enumerate(self._added.split(text)):
            found = [piece] if i % 2 else self._words.findall(piece)
            end = at + len(piece)
            while len(before) < len(cuts) and cuts[len(before)] < end:
                inside = _words_before(found, cuts[len(before)] - at)
                if inside is None:
                    return None
                before.append(len(words) + inside)
            words += found
            at = end
        before += [len(words)] * (len(cuts) - len(before))
        if "".join(words) != text:  # the expression left something out
            return None
        ids = list(map(self._ids.__getitem__, words))
        tokens = [sum(map(len, ids[first:last])) // 4 for first, last in pairwise([0, *before])]
        return memoryview(b"".join(ids)).cast("i").tolist(), list(accumulate(tokens))


def _words_before(words: Sequence[str], length: int) -> int | None:
    """How many words the first `length` characters are; None where a word crosses their end."""
    for count, word in enumerate(words):
        if length <= 0:
            return count if length == 0 else None
        length -= len(word)
    return len(words) if length == 0 else None


def word_memo(tokenizer: Tokenizer) -> WordMemo | None:
    """The memo of a tokenizer; None for one that isn't plain byte-level BPE, or where the two were seen to differ."""
    model, normalizer = tokenizer.model, tokenizer.normalizer
    if not isinstance(model, models.BPE) or model.dropout is not None or tokenizer.encode_special_tokens:
        return None
    if normalizer is not None and json.loads(normalizer.__getstate__())["type"] != "NFC":
        return None
    added = tokenizer.get_added_tokens_decoder()
    plain = all(not (token.lstrip or token.rstrip or token.single_word) for token in added.values())
    if not plain or len({token.normalized for token in added.values()}) > 1:
        return None
    expression = _expression(tokenizer.pre_tokenizer)
    words = None if expression is None else _as_python(expression)
    if words is None:
        return None
    memo = WordMemo(model, words, {token.content: id_ for id_, token in added.items()})
    found = memo.encode(probe := _probe(list(memo._ids.added)))
    agrees = found is not None and found[0] == tokenizer.encode_batch_fast([probe], add_special_tokens=False)[0].ids
    return memo if agrees else None


def _expression(pre_tokenizer: Any) -> str | None:
    """The expression that cuts words: ByteLevel's own, or that of one Split in front of it."""
    if pre_tokenizer is None:
        return None
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last["use_regex"]:
        return _GPT2
    split = steps[0]
    if len(steps) != 2 or last["use_regex"] or split["type"] != "Split":
        return None
    return split["pattern"].get("Regex") if split["behavior"] == "Isolated" and not split["invert"] else None


def _as_python(expression: str) -> re.Pattern[str] | None:
    """The expression with its character classes spelled out over ``ALPHABET``; None where it has others."""
    made: list[str] = []
    inside = False  # of [ ]
    for named, escaped, plain in _PART.findall(expression):
        if named or escaped == "s":
            members = _members(named) if named else _SPACE
            made.append(members if inside else f"[{members}]" if members else "(?!)")
        elif escaped == "S" and not inside:
            made.append(f"[^{_SPACE}]")
        elif escaped:
            if escaped.isalnum() and escaped not in "rnt":
                return None
            made.append("\\" + escaped)
        else:
            if inside and plain in "[&":  # sets within sets, which Python's re lacks
                return None
            inside = plain == "[" or (inside and plain != "]")
            made.append(plain)
    try:
        return re.compile("".join(made))
    except re.error:
        return None


def _members(category: str) -> str:
    """The characters of ``ALPHABET`` in a Unicode category (L, Lu, N …), as the inside of a character class."""
    places = [ord(char) for char in ALPHABET if unicodedata.category(char).startswith(category)]
    ranges: list[list[int]] = []
    for place in places:
        if ranges and place == ranges[-1][1] + 1:
            ranges[-1][1] = place
        else:
            ranges.append([place, place])
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges)


def _probe(added: Sequence[str]) -> str:
    """Each character beside each kind of neighbour, white space and contractions before words, added tokens between."""
    pairs = [f"{near}{char}{near}{char}{char} {char}" for char in ALPHABET for near in _NEIGHBOURS]
    rng = random.Random(0)
    bits = [*" \n\t!'7aB\r", "  ", "\n\n", "don't", "I'LL", "'ve", "x", "1234", *added[:8]]
    return "".join([*pairs, *(rng.choice(bits) for _ in range(4000))])
