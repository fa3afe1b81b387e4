"""What is known of tokens before training: exact targets, what `max_length` costs, where replies stop."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML_PLAIN, make_tokenizer

from chatalign.check import token_findings, tokenizer_finding
from chatalign.data import encode_conversation
from chatalign.recipe import load_recipe
from check.conftest import Check, only, question, write_recipe, write_rows

TOKENIZER = make_tokenizer(CHATML_PLAIN)


def long_question(words: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so " * words}]}


def late_reply() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "why " * 200}, {"role": "assistant", "content": "so"}]}


def tokens_of(row: dict[str, Any]) -> int:
    return len(encode_conversation(row["messages"], TOKENIZER).ids)


def spoil(place: Path, file: str, **changes: Any) -> None:
    path = place / "model" / file
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(before | changes), "utf-8")


def test_rows_that_are_right_have_no_finding_but_ok(check: Check) -> None:
    found = check()
    assert {finding.status for name in ("template", "lengths", "stop_tokens") for finding in found[name]} == {"ok"}
    assert (
        only(found["lengths"], "ok") == "lengths of rows.jsonl: 20 rows looked at, none longer than data.max_length 64"
    )


def test_cut_rows_are_counted_with_the_length_that_keeps_them(place: Path, check: Check) -> None:
    long = long_question(80)
    write_rows(place / "rows.jsonl", [question(i) for i in range(17)] + [long] * 3)
    said = only(check()["lengths"], "note")
    assert "of 20 rows looked at 3 are cut to data.max_length 64 and 0 left out" in said
    assert f"data.max_length {tokens_of(long)} keeps 99 of 100 whole" in said
    mended = check(f"data.max_length={tokens_of(long)}")
    assert [finding.status for finding in mended["lengths"]] == ["ok"]
    dropped = only(check("data.on_overlong=drop")["lengths"], "note")
    assert "0 are cut to data.max_length 64 and 3 left out" in dropped


def test_lost_targets_fail_as_the_stage_would(place: Path, check: Check) -> None:
    write_rows(place / "rows.jsonl", [question(i) for i in range(198)] + [late_reply()] * 2)  # 1 in 100 is let pass
    assert "2 left out (2 with nothing to learn before the cut)" in only(check()["lengths"], "note")
    write_rows(place / "rows.jsonl", [question(i) for i in range(197)] + [late_reply()] * 3)
    said = only(check()["lengths"], "FAIL")
    assert said.startswith("rows.jsonl: 3 of 200 rows looked at have nothing left to learn within data.max_length 64;")
    assert "longer than max_length (64)" in only(check("data.on_overlong=error")["template"], "FAIL")


def test_a_pair_that_a_cut_makes_equal_fails(place: Path, check: Check) -> None:
    same = {"prompt": "hi", "chosen": "so " * 90 + "yes", "rejected": "so " * 90 + "no"}
    write_rows(place / "pairs.jsonl", [same])
    write_recipe(place / "dpo.yaml", stage="dpo", data={"datasets": [{"path": "pairs.jsonl"}], "max_length": 64})
    said = only(check(recipe="dpo.yaml")["lengths"], "FAIL")
    assert said.startswith("pairs.jsonl: 1 of 1 rows looked at have nothing left to learn")


def test_a_template_without_a_stop_token_fails(place: Path, check: Check) -> None:
    rows = [{"messages": question(0)["messages"] + question(1)["messages"]}]
    write_rows(place / "rows.jsonl", rows)
    (place / "bare.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    said = only(check("model.chat_template_path=bare.jinja")["template"], "FAIL")
    assert said.startswith("rows.jsonl:1: ")
    assert "no stop token after an assistant turn → add {{ eos_token }} after its content" in said
    finding = tokenizer_finding(load_recipe("sft.yaml", {"model.chat_template_path": "bare.jinja"}))
    assert finding is not None
    assert str(finding.problem) == said


def test_a_sample_says_its_size(place: Path) -> None:
    write_rows(place / "rows.jsonl", [question(i) for i in range(1000)])
    size = (place / "rows.jsonl").stat().st_size
    found = list(token_findings(load_recipe("sft.yaml"), sample_bytes=size // 10 + 1))
    (lengths,) = [finding for finding in found if finding.check == "lengths"]
    assert lengths.what.startswith("lengths of rows.jsonl: 100 rows looked at (1 in 10)")


@pytest.mark.parametrize(
    ("configured", "words"),
    [
        ({"eos_token_id": 1}, "`eos_token_id` 1 lacks the template's stop token <|im_end|> (3)"),
        ({"eos_token_id": [0, 3], "pad_token_id": 0}, "`pad_token_id` 0 is among `eos_token_id` [0, 3]"),
    ],
)
def test_stop_tokens_of_the_folder_are_a_note(
    place: Path, check: Check, configured: dict[str, Any], words: str
) -> None:
    spoil(place, "generation_config.json", **configured)
    said = only(check()["stop_tokens"], "note")
    assert words in said
    assert "chatalign sets it right in what it trains and saves" in said


def test_a_tokenizer_larger_than_its_model_fails(place: Path, check: Check) -> None:
    spoil(place, "config.json", vocab_size=len(TOKENIZER) - 1)
    said = only(check()["stop_tokens"], "FAIL")
    assert f"the tokenizer has ids up to {len(TOKENIZER) - 1}, the model {len(TOKENIZER) - 1} embedding rows" in said


def test_bad_rows_are_said_once(place: Path, check: Check) -> None:
    write_rows(place / "rows.jsonl", [question(0), {"messages": []}, question(1)])
    found = check()
    assert only(found["rows"], "FAIL").startswith("rows.jsonl:2: messages")
    assert "template" not in found  # no tokenizer is imported until the rows are right


def test_folders_and_max_rows_are_tokenized_too(place: Path) -> None:
    (place / "rows").mkdir()
    for name in ("a", "b"):
        write_rows(place / "rows" / f"{name}.jsonl", [question(i) for i in range(15)])
    for source, rows in (({"path": "rows"}, 30), ({"path": "rows", "max_rows": 18}, 18)):
        write_recipe(place / "folder.yaml", data={"datasets": [source], "max_length": 64})
        (lengths,) = [one for one in token_findings(load_recipe("folder.yaml")) if one.check == "lengths"]
        assert lengths.what.startswith(f"lengths of rows: {rows} rows looked at, none longer")


def test_a_file_that_breaks_off_is_said_once(place: Path, check: Check) -> None:
    packed = gzip.compress("".join(json.dumps(question(i)) + "\n" for i in range(500)).encode())
    (place / "rows.jsonl.gz").write_bytes(packed[:-20])
    found = check("data.datasets.0.path=rows.jsonl.gz")
    assert "rows.jsonl.gz: can't be read (" in only(found["rows"], "FAIL")
    assert {finding.status for finding in found.get("template", [])} <= {"ok"}
