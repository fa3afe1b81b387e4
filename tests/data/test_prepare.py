"""From a data section to tokenized datasets: splits, mixtures, lengths and the account of what was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bad_rows import m
from chat_families import BY_NAME, make, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from chatalign.data import check_data, prepare
from chatalign.data.chat import Encoded, EncodedPair
from chatalign.data.lengths import Dropped, cut_document, fit_conversation, fit_pair, fit_prompt
from chatalign.data.mixing import is_eval, prompt_hash
from chatalign.data.rows import Conversation
from chatalign.errors import DataError, TemplateError
from chatalign.recipe import DataSection

TOKENIZER = tokenizer_of(BY_NAME["chatml"])


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def qa(i: int, reply: str = "yes") -> dict[str, Any]:
    return {"prompt": f"question {i}", "completion": reply}


def section(*paths: str, **settings: Any) -> DataSection:
    sources = [path if isinstance(path, dict) else {"path": path} for path in paths]
    return DataSection(datasets=sources, **settings)


def prompts_of(dataset: Any, tokenizer: Any = TOKENIZER) -> list[str]:
    return [tokenizer.decode(ids).split("<|im_end|>")[0] for ids in dataset["input_ids"]]


def test_columns_of_each_kind(tmp_path: Path) -> None:
    demo = rows_file(tmp_path / "sft.jsonl", [qa(0)])
    pair = rows_file(tmp_path / "pair.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    thumb = rows_file(tmp_path / "kto.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    text = rows_file(tmp_path / "text.jsonl", [{"text": "hello"}])
    prompt = rows_file(tmp_path / "prompt.jsonl", [{"prompt": "a", "answer": [1]}])
    for path, kind, columns in [
        (demo, "conversation", ["input_ids", "supervised"]),
        (text, "text", ["input_ids", "supervised"]),
        (pair, "preference", ["prompt_ids", "chosen_ids", "rejected_ids"]),
        (thumb, "unpaired", ["prompt_ids", "completion_ids", "label"]),
        (prompt, "prompt", ["prompt_ids", "prompt", "extra"]),
    ]:
        made = prepare(section(path), TOKENIZER, kind, seed=0)
        assert made.train.column_names == columns
        assert made.eval is None
        assert (made.used[0].rows, made.used[0].used) == (1, 1)
    row = made.train[0]
    assert json.loads(row["prompt"]) == [{"role": "user", "content": "a"}]
    assert json.loads(row["extra"]) == {"answer": [1]}
    assert TOKENIZER.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.floats(0.1, 0.9))
def test_a_copy_never_straddles_the_split(numbers: list[int], share: float) -> None:
    """The side is the content's: whatever the order, the case and the white space around it."""
    sides: dict[int, set[bool]] = {}
    for place, number in enumerate(numbers):
        text = [f"Question {number}", f"question  {number}\n", f"QUESTION {number}"][place % 3]
        row = Conversation(messages=[{"role": "user", "content": text}, {"role": "assistant", "content": str(place)}])
        sides.setdefault(number, set()).add(is_eval(prompt_hash(row), share))
    assert all(len(side) == 1 for side in sides.values())


def test_eval_fraction_is_near_its_share_and_disjoint(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "sft.jsonl", [qa(i % 300) for i in range(400)])
    made = prepare(section(path, eval_fraction=0.25), TOKENIZER, "conversation", seed=0)
    assert made.eval is not None
    assert len(made.train) + len(made.eval) == 400
    assert 60 < len(made.eval) < 140
    assert not set(prompts_of(made.train)) & set(prompts_of(made.eval))
    again = prepare(section(path, eval_fraction=0.25), TOKENIZER, "conversation", seed=7)
    assert again.eval is not None
    assert again.eval["input_ids"] == made.eval["input_ids"]


def test_training_rows_that_are_evaluated_are_left_out_and_counted(tmp_path: Path) -> None:
    train = rows_file(tmp_path / "train.jsonl", [qa(i) for i in range(5)])
    held_out = rows_file(tmp_path / "eval.jsonl", [qa(3, "other"), qa(9)])
    made = prepare(section(train, eval_datasets=[{"path": held_out}]), TOKENIZER, "conversation", seed=0)
    assert len(made.train) == 4
    assert made.eval is not None
    assert len(made.eval) == 2
    assert made.used[0].dropped == {"its prompt is in eval_datasets": 1}


def test_weighted_sources_reach_the_dataset(tmp_path: Path) -> None:
    many = rows_file(tmp_path / "many.jsonl", [qa(i) for i in range(30)])
    few = rows_file(tmp_path / "few.jsonl", [qa(100)])
    made = prepare(section({"path": many, "weight": 2}, {"path": few, "weight": 1}), TOKENIZER, "conversation", seed=0)
    shown = prompts_of(made.train)
    assert len(shown) == 31
    assert sum("question 100" in prompt for prompt in shown) == 10


def encoded(length: int, first_target: int) -> Encoded:
    marks = [0] * first_target + [1] * (length - first_target)
    return Encoded(list(range(length)), marks, ((first_target, length),))


def test_demonstrations_keep_their_start() -> None:
    fitted = fit_conversation(encoded(10, 4), 6, "truncate")
    assert isinstance(fitted, Encoded)
    assert (fitted.ids, fitted.supervised, fitted.spans) == (list(range(6)), [0, 0, 0, 0, 1, 1], ((4, 6),))
    assert fit_conversation(encoded(10, 4), 10, "drop") == encoded(10, 4)
    assert fit_conversation(encoded(10, 6), 6, "truncate") == Dropped("no target within max_length (6)", True)
    assert isinstance(fit_conversation(encoded(10, 0), 1, "truncate"), Dropped)  # a first token is never predicted
    assert fit_conversation(encoded(10, 4), 6, "drop") == Dropped("longer than max_length (6)")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(8, 70), st.none() | st.integers(1, 70))
def test_pairs_keep_the_prompts_end_and_both_sides(
    prompt: int, chosen: int, rejected: int, max_length: int, max_prompt: int | None
) -> None:
    pair = EncodedPair(list(range(prompt)), list(range(100, 100 + chosen)), list(range(200, 200 + rejected)))
    fitted = fit_pair(pair, max_length, max_prompt, "truncate")
    assert isinstance(fitted, EncodedPair)
    assert fitted.prompt_ids == pair.prompt_ids[-len(fitted.prompt_ids) :]
    assert fitted.chosen_ids == pair.chosen_ids[: len(fitted.chosen_ids)] != []
    assert fitted.rejected_ids == pair.rejected_ids[: len(fitted.rejected_ids)] != []
    assert len(fitted.prompt_ids) + max(len(fitted.chosen_ids), len(fitted.rejected_ids)) <= max_length
    if prompt + max(chosen, rejected) <= max_length and prompt <= (max_prompt or prompt):
        assert fitted == pair


def test_pairs_that_a_cut_makes_equal_are_dropped() -> None:
    pair = EncodedPair([1, 2], [3] * 20 + [4], [3] * 20 + [5])
    assert isinstance(fit_pair(pair, 10, None, "truncate"), Dropped)


def test_prompts_and_documents() -> None:
    assert fit_prompt([1, 2, 3], 2, "truncate") == [2, 3]
    assert isinstance(fit_prompt([1, 2, 3], 2, "drop"), Dropped)
    assert cut_document([1, 2, 3, 4, 5, 6, 7], 3) == [[1, 2, 3], [4, 5, 6]]  # a lone token teaches nothing


def test_overlong_rows(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "sft.jsonl", [qa(0), qa(1, "yes " * 60), qa(2)])
    drop = prepare(section(path, max_length=32, on_overlong="drop"), TOKENIZER, "conversation", seed=0)
    assert drop.used[0].dropped == {"longer than max_length (32)": 1}
    cut = prepare(section(path, max_length=32), TOKENIZER, "conversation", seed=0)
    assert sorted(map(len, cut.train["input_ids"]))[-1] == 32
    with pytest.raises(DataError, match=r"sft\.jsonl:2: longer than max_length \(32\) → raise it"):
        prepare(section(path, max_length=32, on_overlong="error"), TOKENIZER, "conversation", seed=0)


def test_rows_without_targets_stop_the_run_above_one_in_a_hundred(tmp_path: Path) -> None:
    long_question = {"prompt": "why " * 60, "completion": "yes"}
    some = rows_file(tmp_path / "some.jsonl", [qa(0), long_question])
    with pytest.raises(DataError, match=r"1 of 2 rows have nothing left to learn within data\.max_length 32"):
        prepare(section(some, max_length=32), TOKENIZER, "conversation", seed=0)
    few = rows_file(tmp_path / "few.jsonl", [*(qa(i) for i in range(100)), long_question])
    made = prepare(section(few, max_length=32), TOKENIZER, "conversation", seed=0)
    assert made.used[0].dropped == {"no target within max_length (32)": 1}


def test_bad_rows_stop_the_run_or_are_counted(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "sft.jsonl", [qa(0), {"prompt": "x", "completion": ""}, {"prompt": "x"}, qa(3)])
    with Path(path).open("a") as file:
        file.write('{"prompt": \n')
    with pytest.raises(DataError, match=r"sft\.jsonl:5: broken JSON"):
        prepare(section(path), TOKENIZER, "conversation", seed=0)
    made = prepare(section(path, on_bad_row="drop"), TOKENIZER, "conversation", seed=0)
    assert (made.used[0].rows, made.used[0].used) == (5, 2)
    assert made.used[0].dropped == {
        "broken JSON": 1,
        "completion: is empty": 1,
        "completion: is missing, not a list of turns": 1,
    }
    assert made.used[0].examples == {
        "broken JSON": [f"{path}:5"],
        "completion: is empty": [f"{path}:2"],
        "completion: is missing, not a list of turns": [f"{path}:3"],
    }


def test_five_rows_of_each_reason_are_named(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "sft.jsonl", [qa(0), *({"prompt": "x", "completion": ""} for _ in range(9))])
    used = prepare(section(path, on_bad_row="drop"), TOKENIZER, "conversation", seed=0).used[0]
    assert used.dropped == {"completion: is empty": 9}
    assert used.examples == {"completion: is empty": [f"{path}:{row}" for row in range(2, 7)]}


def test_raw_text_without_a_template(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "sft.jsonl", [{"prompt": "<|im_start|>q\n", "completion": "yes"}])
    made = prepare(section(path, apply_chat_template=False), TOKENIZER, "conversation", seed=0)
    row = made.train[0]
    assert TOKENIZER.decode(row["input_ids"]) == "<|im_start|>q\nyes<|im_end|>"
    assert row["input_ids"][0] == TOKENIZER.convert_tokens_to_ids("<|im_start|>")  # the user's own template
    assert TOKENIZER.decode([i for i, mark in zip(row["input_ids"], row["supervised"], strict=True) if mark]) == (
        "yes<|im_end|>"
    )
    bare = make("", "<|im_end|>", special=("<|im_start|>",))
    forged = prepare(section(path), bare, "conversation", seed=0).train[0]["input_ids"]
    assert bare.convert_tokens_to_ids("<|im_start|>") not in forged
    turns = rows_file(tmp_path / "turns.jsonl", [{"messages": m("a", "b")}])
    with pytest.raises(DataError, match="turns need a chat template"):
        prepare(section(turns, apply_chat_template=False), TOKENIZER, "conversation", seed=0)
    with pytest.raises(TemplateError, match="no chat template"):
        prepare(section(turns), bare, "conversation", seed=0)


def test_documents_end_in_eos_and_are_cut(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "text.jsonl", [{"text": "hello <|im_end|> world " * 9}])
    made = prepare(section(path, max_length=16), TOKENIZER, "text", seed=0)
    ids = [id_ for piece in made.train["input_ids"] for id_ in piece]
    eos = TOKENIZER.eos_token_id
    assert ids.count(eos) == 1  # the written ones are text
    assert ids[-1] == eos
    assert all(len(piece) <= 16 for piece in made.train["input_ids"])
    bare = prepare(section(path, max_length=16), TOKENIZER, "text", seed=0, eos_for_text=False)
    assert eos not in [id_ for piece in bare.train["input_ids"] for id_ in piece]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "sft.jsonl", [qa(0)])
    with pytest.raises(DataError, match=r"no row is left to train on; see the counts: its prompt is in eval"):
        prepare(section(path, eval_datasets=[{"path": path}]), TOKENIZER, "conversation", seed=0)
    with pytest.raises(DataError, match="no row is left"):
        prepare(section(path, eval_fraction=0.0001), TOKENIZER, "conversation", seed=0)


def test_check_data_finds_what_prepare_would(tmp_path: Path) -> None:
    good = rows_file(tmp_path / "good.jsonl", [qa(i) for i in range(9)])
    bad = rows_file(
        tmp_path / "bad.jsonl", [qa(0), {"prompt": "x", "completion": ""}, {"prompt": "", "completion": "y"}]
    )
    assert check_data(section(good), "conversation") == []
    assert check_data(section(good, bad), "conversation") == [
        f"{bad}:2: completion: is empty → write the text, or take the row out",
        f"{bad}:3: prompt: is empty → write the text, or take the row out",
    ]
    assert check_data(section(bad, on_bad_row="drop"), "conversation") == []
    (wrong,) = check_data(section(good), "preference")
    assert "needs preference pairs" in wrong
    (missing,) = check_data(section(str(tmp_path / "goood.jsonl")), "conversation")
    assert f"did you mean {good}?" in missing
    (leaves,) = check_data(section(good, eval_fraction=0.0001), "conversation")
    assert "leaves none for evaluation" in leaves
    (leak,) = check_data(section(good, eval_datasets=[{"path": good}]), "conversation")
    assert "every training prompt is in it too" in leak
    many = rows_file(tmp_path / "many.jsonl", [{"prompt": "", "completion": "y"} for _ in range(50)])
    assert check_data(section(many), "conversation")[-1].startswith(f"{many}: 30 more bad rows")


@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [
        ("alpaca_en_demo.json", "conversation", 999),
        ("alpaca_zh_demo.json", "conversation", 1000),
        ("glaive_toolcall_en_demo.json", "conversation", 300),
        ("dpo_en_demo.json", "preference", 300),
        ("kto_en_demo.json", "unpaired", 300),
        ("c4_demo.jsonl", "text", 300),
        ("wiki_demo.txt", "text", 30),
    ],
)
def test_real_files_load_as_they_are(shared_data: Path, name: str, kind: Any, rows: int) -> None:
    data = section({"path": str(shared_data / name)}, max_length=8192)
    assert check_data(data, kind) == []
    made = prepare(section({"path": str(shared_data / name), "max_rows": 60}, max_length=8192), TOKENIZER, kind, seed=0)
    assert made.used[0].dropped == {}
    assert made.used[0].used == min(rows, 60)


def test_check_and_reading_import_no_torch() -> None:
    import subprocess
    import sys

    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, chatalign.data; chatalign.data.check_data; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
