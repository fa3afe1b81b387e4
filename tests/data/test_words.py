"""The memo of words gives the tokenizer's own ids and cuts, or stands back."""

from __future__ import annotations

import re
from typing import Any

import pytest
from chat_families import CHATML, FAMILIES, LLAMA3, Family, make, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from chatalign.data import tokens, words
from chatalign.data.chat import ChatEncoder
from chatalign.data.rows import BadRow, Conversation
from chatalign.data.words import ALPHABET, word_memo

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = [
    make(CHATML, "<|im_end|>", special=("<|im_start|>",)),
    make(LLAMA3, "<|eot_id|>", "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>"), split=QWEN),
]
MEMOS = [word_memo(tokenizer.backend_tokenizer) for tokenizer in BYTE_LEVEL]
PIECES = ["<|im_end|>", "<|eot_id|>", "don't", "I'LL", "  ", "\n\n", "\r\n", " \n ", "1234", "x_y", "é", "'", "\x1c"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(st.sampled_from(ALPHABET), max_size=8), max_size=20).map("".join)


def own(tokenizer: Any, text: str) -> Any:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXT, st.sampled_from([0, 1]), st.data())
def test_ids_and_cuts_are_the_tokenizers(text: str, which: int, data: st.DataObject) -> None:
    memo = MEMOS[which]
    assert memo is not None
    encoding = own(BYTE_LEVEL[which], text)
    assert memo.encode(text) == (encoding.ids, [])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    found = memo.encode(text, cuts)
    if found is None:  # a cut inside a word
        return
    for cut, before in zip(cuts, found[1], strict=True):
        assert all(end <= cut for _, end in encoding.offsets[:before])
        assert all(start >= cut for start, _ in encoding.offsets[before:])


def test_a_cut_inside_a_word_and_foreign_characters_are_left_to_the_tokenizer() -> None:
    memo = word_memo(BYTE_LEVEL[0].backend_tokenizer)
    assert memo is not None
    assert memo.encode("hello world", [5]) is not None
    assert memo.encode("hello world", [3]) is None
    assert memo.encode("你好") is None
    assert memo.encode("a\u2028b") is None  # white space to some, and none to others
    assert memo.encode("İ ſ") is None


def test_only_plain_byte_level_bpe_has_a_memo(family: Family) -> None:
    assert (word_memo(tokenizer_of(family).backend_tokenizer) is None) == bool(family.metaspace)


def _changed(change: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(BYTE_LEVEL[0].backend_tokenizer.to_str())
    if change == "lower case":
        tokenizer.normalizer = normalizers.Lowercase()
    elif change == "a prefix space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "another cut":
        split = pre_tokenizers.Split(Regex(r"\p{Greek}+|\s+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif change == "text that no word takes":
        split = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif change == "a token that eats spaces":
        tokenizer.add_tokens([AddedToken("<eats>", rstrip=True)])
    elif change == "dropout":
        tokenizer.model.dropout = 0.1
    return tokenizer


@pytest.mark.parametrize(
    "change",
    ["lower case", "a prefix space", "another cut", "text that no word takes", "a token that eats spaces", "dropout"],
)
def test_tokenizers_of_another_form_have_none(change: str) -> None:
    assert word_memo(_changed(change)) is None


def test_nfc_is_followed() -> None:
    tokenizer = _changed("nothing")
    tokenizer.normalizer = normalizers.NFC()
    memo = word_memo(tokenizer)
    assert memo is not None
    assert memo.encode("café") == (tokenizer.encode("café", add_special_tokens=False).ids, [])
    assert memo.encode("cafe\u0301") is None


def test_an_expression_that_python_reads_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BYTE_LEVEL[0].backend_tokenizer
    assert word_memo(backend) is not None
    monkeypatch.setattr(words, "_as_python", lambda _: re.compile(r" ?\w+|\s+|[^\w\s]+"))
    assert word_memo(backend) is None


def test_the_memo_starts_anew_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 20)
    tokenizer = BYTE_LEVEL[0]
    memo = word_memo(tokenizer.backend_tokenizer)
    assert memo is not None
    for i in range(50):
        text = f"<|im_start|>word{i} and {i * 7}<|im_end|>"
        assert memo.encode(text) == (own(tokenizer, text).ids, [])
        assert len(memo._ids) <= 20


def test_rows_are_the_same_with_the_memo(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside rows with forged tokens and rows in other scripts, which it can't take."""
    contents = ["hello", " x ", "what is 1 + 2?\n", f"a{family.stop}b", "你好", "\n\nyes", "don't", "café “x”"]
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
        for asked in contents
        for replied in contents
    ]
    rows = [Conversation(messages=messages) for messages in turns]
    plain = ChatEncoder(tokenizer_of(family)).conversations(rows, "assistant")
    monkeypatch.setattr(tokens, "_MEMO_TEXTS", 1)
    encoder = ChatEncoder(tokenizer_of(family))
    encoder.verify_rows = len(rows)
    found = encoder.conversations(rows, "assistant")
    assert (encoder.text._memo is None) == bool(family.metaspace)
    for one, other in zip(plain, found, strict=True):
        assert isinstance(one, BadRow) == isinstance(other, BadRow)
        assert isinstance(one, BadRow) or one == other
