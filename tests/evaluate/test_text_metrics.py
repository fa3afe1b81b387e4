"""BLEU, ROUGE and exact match through evaluate without a network, in English and Chinese."""

from __future__ import annotations

import pytest

from chatalign.errors import DataError
from chatalign.evaluate.compare import accuracy_of, means, win_rate
from chatalign.evaluate.heldout import references, shown
from chatalign.evaluate.metrics import text_metrics


def test_known_values() -> None:
    values = text_metrics(
        ["bleu", "rouge", "accuracy"], ["the cat sat", "Paris."], [["the cat sat"], ["paris", "Lyon"]]
    )
    assert values["exact_match"] == 1.0
    assert values["rougeL"] == values["rouge1"] == 1.0
    half = text_metrics(["rouge"], ["the cat"], [["the cat sat down"]])
    assert half["rouge1"] == pytest.approx(2 * 1.0 * 0.5 / 1.5)  # precision 1, recall ½
    assert half["rouge2"] == pytest.approx(2 * 1.0 * (1 / 3) / (4 / 3))


def test_bleu_is_sacrebleu_s() -> None:
    import sacrebleu

    replies, known = ["the cat sat on a mat", "hello world"], [["the cat sat on the mat"], ["hello, world", "hi world"]]
    streams = [["the cat sat on the mat", "hello, world"], [None, "hi world"]]
    expected = sacrebleu.BLEU(effective_order=True).corpus_score(replies, streams).score
    assert text_metrics(["bleu"], replies, known)["bleu"] == pytest.approx(expected)


def test_chinese_is_compared_by_character() -> None:
    values = text_metrics(["bleu", "rouge", "accuracy"], ["答案是巴黎。"], [["答案是巴黎"]])
    assert values["exact_match"] == 1.0
    assert values["rouge1"] == 1.0
    assert values["bleu"] > 50
    near = text_metrics(["bleu", "rouge"], ["答案是伦敦"], [["答案是巴黎"]])
    assert near["rouge1"] == pytest.approx(3 / 5)
    assert 0 < near["bleu"] < values["bleu"]


def test_a_prompt_without_reference_is_named() -> None:
    with pytest.raises(DataError, match="prompt 2 has none"):
        text_metrics(["rouge"], ["a", "b"], [["a"], []])
    assert text_metrics([], ["a"], [[]]) == {}


def test_references_are_found_in_every_format() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert references({"answers": ["x", "y"]}) == ["x", "y"]
    assert references({"instruction": "q", "output": "a"}) == ["a"]
    assert references({"messages": turns}) == ["a"]
    assert references({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}) == ["a"]
    assert references({"prompt": "q", "chosen": turns[1:]}) == ["a"]
    assert references({"prompt": "q", "chosen": "a", "rejected": "b"}) == ["a"]
    assert references({"prompt": turns[:1]}) == []
    assert shown(turns) == "user: q\nassistant: a"


def test_comparisons_by_hand() -> None:
    rate, (low, high) = win_rate([1, 2, 3, 4], [0, 2, 4, 3])
    assert rate == 0.625
    assert (round(low, 3), round(high, 3)) == (0.219, 0.908)  # (.625 + .4802 ± 1.96 √.1186) / 1.9604
    assert accuracy_of([1.0, 0.0, -1.0, 2.0]) == 0.625
    assert means([{"a": 1.0, "b": "x"}, {"a": 3.0, "b": "y", "c": 1}]) == {"a": 2.0}
    with pytest.raises(ValueError, match="zip"):
        win_rate([1.0], [1.0, 2.0])
