"""Rows that ``data.clean`` leaves out: planted ones with known answers, and all pairs of rows by brute force."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from chat_families import BY_NAME, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from chatalign.check.models import package_findings
from chatalign.data import prepare
from chatalign.data.encode import RowEncoder
from chatalign.data.languages import other_language
from chatalign.data.near_duplicates import band_hashes, banding, later_copies
from chatalign.data.ngrams import contained, ngrams, words, words_and_marks
from chatalign.data.profiles import content_digest, row_ngrams
from chatalign.data.rows import Conversation
from chatalign.errors import DataError, DependencyError
from chatalign.recipe import DataSection, validate_stage

TOKENIZER = tokenizer_of(BY_NAME["chatml"])
SUBJECTS = ("the old river", "a small engine", "my neighbour", "this theorem", "the green parrot", "our city")
VERBS = ("crosses", "explains", "carries", "forgets", "paints", "measures")
OBJECTS = ("a wooden bridge", "nine heavy books", "the long winter", "every open window", "some warm bread")


@pytest.fixture(autouse=True)
def nothing_kept() -> Any:
    datasets.disable_caching()
    yield
    datasets.enable_caching()


def rows_file(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def cleaned(path: str, clean: dict[str, Any], kind: Any = "conversation", **more: Any) -> Any:
    section = DataSection(datasets=[{"path": path}], clean={"exact_duplicates": False} | clean, **more)
    return prepare(section, TOKENIZER, kind, seed=0)


def kept(path: str, clean: dict[str, Any], kind: Any = "conversation", **more: Any) -> list[int]:
    """The lines, from 1, of the rows that stay to train on."""
    origin = cleaned(path, clean, kind, **more).train_origin
    return [int(place.rpartition(":")[2]) for place in origin["place"]]


def sentence(rng: random.Random) -> str:
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}"


def qa(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


# Words and n-grams.


def test_words_are_runs_of_letters_and_single_chinese_characters() -> None:
    assert words("It's 3.5 KM, naïve_x!") == ["it", "s", "3", "5", "km", "naïve_x"]
    assert words("我有 2个苹果。OK吗") == ["我", "有", "2", "个", "苹", "果", "ok", "吗"]
    assert words("カタカナ ひ") == ["カ", "タ", "カ", "ナ", "ひ"]
    assert words("한국어 단어") == ["한국어", "단어"]  # Korean has spaces
    assert words_and_marks("3 - 4?") == ["3", "-", "4", "?"]
    assert words("…!?") == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 8))
def test_hashes_are_equal_where_ngrams_are(left: list[str], right: list[str], n: int) -> None:
    """As Python's sets of tuples."""

    def sets(of: list[str]) -> set[tuple[str, ...]]:
        width = min(n, len(of))
        return {tuple(of[i : i + width]) for i in range(len(of) - width + 1)} if of else set()

    ours, theirs = ngrams(left, n), ngrams(right, n)
    assert len(ours) == len(sets(left))
    assert list(ours) == sorted(set(ours.tolist()))
    assert contained(ours, theirs).sum() == len(sets(left) & sets(right))


def test_short_parts_give_no_ngram_but_short_rows_one() -> None:
    assert len(row_ngrams(["a b c d", "e f"], 3)) == 2  # abc, bcd
    assert len(row_ngrams(["a b", "c"], 3)) == 1
    assert row_ngrams(["a b", "c"], 9).tolist() == row_ngrams(["A b!", "c"], 5).tolist()
    assert row_ngrams(["?", "!"], 3).tolist() == []


# Filters.


def test_lengths_in_words_and_turns(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "four words are here"} for role in ("user", "assistant") * 2]
    rows = [
        {"messages": turns},  # 4 turns, 16 words
        {"messages": [{"role": "system", "content": "be kind and brief"}, *turns[:2]]},  # 2 turns, 8 words
        {"messages": [{"role": "user", "content": "你好吗"}, {"role": "assistant", "content": "好。"}]},  # 4 words
    ]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    assert kept(path, {"min_words": 8}) == [1, 2]
    assert kept(path, {"min_words": 5, "max_words": 15}) == [2]
    assert kept(path, {"max_turns": 2}) == [2, 3]
    assert kept(path, {"min_turns": 3}) == [1]
    used = cleaned(path, {"min_words": 5, "max_words": 15, "max_turns": 3}).used[0]
    assert used.dropped == {"fewer than 5 words": 1, "more than 3 turns": 1}  # the first reason counts
    assert used.examples == {"fewer than 5 words": [f"{path}:3"], "more than 3 turns": [f"{path}:1"]}


LANGUAGES = {
    "en": ["How do I bake bread at home?", "Write a short poem about the sea.", "Name three primary colours."],
    "zh": ["请写一首关于春天的诗。", "比较以下两位著名人物", "怎样在家里做面包？"],
    "de": ["Wie spät ist es gerade in Berlin?", "Schreibe ein kurzes Gedicht über das Meer."],
    "fr": ["Quelle heure est-il à Paris ?", "Écris un petit poème sur la mer."],
    "ja": ["今何時ですか。", "パンの焼き方を教えてください。"],
}


def test_other_languages_are_left_out_and_unsure_rows_stay(tmp_path: Path) -> None:
    for language, texts in LANGUAGES.items():
        for text in texts:
            assert (other_language(text, ["en", "zh"]) is None) == (language in ("en", "zh")), text
    for unsure in ("yes", "42", "print('hello')", "OK", "!!!"):
        assert other_language(unsure, ["en"]) is None
    rows = [qa(text, text) for text in (LANGUAGES["en"][0], LANGUAGES["zh"][0], LANGUAGES["de"][0])]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    used = cleaned(path, {"languages": ["en"]}).used[0]
    assert used.dropped == {"in another language (de)": 1, "in another language (zh)": 1}
    with pytest.raises(DataError, match=r"`xx` is no language that py3langid tells; use ISO 639 codes: .*en,"):
        cleaned(path, {"languages": ["xx"]})


# Duplicates.


def test_exact_duplicates_by_whole_rows(tmp_path: Path) -> None:
    rows = [
        qa("What is  up?", "The sky."),
        qa("what is up?", "the SKY.\n"),  # case and white space don't count
        qa("What is up?", "The sky"),
        qa("What is up, the?", "sky."),  # the same words, another turn
    ]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    assert kept(path, {"exact_duplicates": True}) == [1, 3, 4]
    labelled = [qa("a", "b") | {"label": label} for label in (True, False, True)]
    assert kept(rows_file(tmp_path / "kto.jsonl", labelled), {"exact_duplicates": True}, "unpaired") == [1, 2]
    pairs = [{"prompt": "a", "chosen": c, "rejected": r} for c, r in [("b", "c"), ("c", "b"), ("B", "c")]]
    assert kept(rows_file(tmp_path / "dpo.jsonl", pairs), {"exact_duplicates": True}, "preference") == [1, 2]
    system = [{"role": "system", "content": "s"}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert content_digest(Conversation(messages=turns)) != content_digest(Conversation(messages=system + turns))


def test_the_first_wins_over_all_sources(tmp_path: Path) -> None:
    one = rows_file(tmp_path / "one.jsonl", [qa("a", "b"), qa("c", "d"), qa("a", "b")])
    two = rows_file(tmp_path / "two.jsonl", [qa("c", "d"), qa("e", "f")])
    section = DataSection(datasets=[{"path": one}, {"path": two}, {"path": one, "max_rows": 1}], clean={})
    made = prepare(section, TOKENIZER, "conversation", seed=0)
    assert made.train_origin is not None
    assert made.train_origin["place"][:] == [f"{one}:1", f"{one}:2", f"{two}:2"]
    reason = "duplicate of an earlier row"
    assert [account.dropped for account in made.used] == [{reason: 1}, {reason: 1}, {reason: 1}]


def five_grams(text: str) -> set[tuple[str, ...]]:
    tokens = list(text) if text > "一" else text.split()
    return {tuple(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}


def jaccard(left: set[Any], right: set[Any]) -> float:
    return len(left & right) / len(left | right)


def edited_rows(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Rows of 40 to 80 words, English and Chinese; each third is an earlier one with up to eight words changed."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        parts = [chinese(rng) if i % 4 == 0 else english(rng) for _ in range(2)]
        if rows and i % 3 == 0:
            parts = list(rng.choice(rows).values())
            for _ in range(rng.randrange(9)):
                side = rng.randrange(2)
                parts[side] = edited(rng, parts[side])
        rows.append(qa(*parts))
    return rows


def chinese(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x4F00)) for _ in range(40))


def english(rng: random.Random) -> str:
    return " ".join(sentence(rng) for _ in range(rng.randrange(5, 9)))


def edited(rng: random.Random, text: str) -> str:
    if text > "一":
        at = rng.randrange(len(text))
        return text[:at] + rng.choice("龘靐") + text[at + 1 :]
    tokens = text.split()
    tokens[rng.randrange(len(tokens))] = f"word{rng.randrange(99)}"
    return " ".join(tokens)


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.95])
def test_near_duplicates_are_those_of_all_pairs(threshold: float, tmp_path: Path) -> None:
    """Every pair's exact Jaccard by Python's sets: a row goes where an earlier one that stays is near in both parts."""
    rows = edited_rows(random.Random(7), 300)
    parts = [[five_grams(text) for text in row.values()] for row in rows]
    stay: list[int] = []
    for i, mine in enumerate(parts):
        near = (all(jaccard(a, b) >= threshold for a, b in zip(mine, parts[j], strict=True)) for j in stay)
        if not any(near):
            stay.append(i)
    assert 210 < len(stay) < 290  # both answers are there in number
    path = rows_file(tmp_path / "rows.jsonl", rows)
    assert kept(path, {"near_duplicates": threshold}) == [i + 1 for i in stay]


def test_another_reply_or_another_question_is_no_near_duplicate(tmp_path: Path) -> None:
    long = " ".join(sentence(random.Random(i)) for i in range(20))
    rows = [
        qa(f"{long}. What is 3 + 4?", "seven"),
        qa(f"{long}. What is 3 - 4?", "minus one"),
        qa(f"{long}. What is 3 + 4 ?", "Seven"),  # of the first
        qa("Why?", long),
        qa("Where?", long),
    ]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    assert kept(path, {"near_duplicates": 0.8}) == [1, 2, 4, 5]
    pairs = [{"prompt": long, "chosen": "yes", "rejected": r} for r in ("no", "never", "No")]
    assert kept(rows_file(tmp_path / "pairs.jsonl", pairs), {"near_duplicates": 0.8}, "preference") == [1, 2]


def test_bands_are_as_long_as_the_threshold_allows() -> None:
    """At Jaccard 0.8, 25 bands of 5: 1 − (1 − 0.8⁵)²⁵ = 0.99995; 21 of 6 would find 0.9983 of such pairs."""
    assert banding(0.8) == (25, 5)
    assert 1 - (1 - 0.8**6) ** 21 < 0.999 <= 1 - (1 - 0.8**5) ** 25
    assert banding(0.7) == (32, 4)


def test_a_shared_band_alone_leaves_no_row_out() -> None:
    """What MinHash says is looked at and not believed: here every row shares every band."""
    parts = [[ngrams(f"text number {i} of its own kind".split(), 5) for i in range(6)]]
    assert later_copies(np.arange(6), np.zeros((6, 4), np.uint64), parts, 0.8) == []
    parts[0][4] = parts[0][1]
    assert later_copies(np.arange(6), np.zeros((6, 4), np.uint64), parts, 0.8) == [4]
    assert later_copies(np.array([2, 3, 4]), np.zeros((6, 4), np.uint64), parts, 0.8) == []


def test_minhash_estimates_the_jaccard() -> None:
    """The share of equal bands of one value is the Jaccard of the sets: 60 of 100 shared, 60/140, within 4 σ."""
    numbers = np.random.default_rng(0).integers(0, 2**64, 140, dtype=np.uint64)
    bands = [band_hashes([numbers[:100], numbers[40:]], 0.7)[:, :32]]  # 32 bands of 4
    assert abs((bands[0][0] == bands[0][1]).mean() - (60 / 140) ** 4) < 4 * (0.0337 * 0.966 / 32) ** 0.5
    again = band_hashes([numbers[::-1][40:], numbers[40:]], 0.7)
    assert again[1].tolist() == bands[0][1].tolist()


# Contamination.


def grams_of(row: dict[str, Any], n: int) -> set[tuple[str, ...]]:
    parts = [text.split() for text in row.values()]
    found = {tuple(part[i : i + n]) for part in parts for i in range(len(part) - n + 1)}
    return found or {tuple(word for part in parts for word in part)}


def test_shared_ngrams_are_those_of_sets(tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = [qa(sentence(rng), " ".join(sentence(rng) for _ in range(rng.randrange(1, 4)))) for _ in range(312)]
    train, held_out = rows[12:], rows[:12]
    path = rows_file(tmp_path / "train.jsonl", train)
    evaluation = rows_file(tmp_path / "eval.jsonl", held_out)
    asked = {row["prompt"] for row in held_out}
    for n in (5, 8, 13):
        among = set().union(*(grams_of(row, n) for row in held_out))
        clean = [i + 1 for i, row in enumerate(train) if not grams_of(row, n) & among and row["prompt"] not in asked]
        assert 20 < len(clean) < 299
        made = kept(path, {"decontaminate": n}, eval_datasets=[{"path": evaluation}])
        assert made == clean


def test_planted_contamination(tmp_path: Path) -> None:
    leaked = "one two three four five six seven eight nine ten eleven twelve thirteen"
    chinese = "床前明月光疑是地上霜举头望明月低头思故乡"
    held_out = [qa(f"Count: {leaked}.", "done"), qa("背诵静夜思", chinese), qa("short question", "short reply")]
    system = {"role": "system", "content": leaked}
    pairs = [
        qa("Say it", "so, ONE two three, four five six seven eight nine ten eleven twelve - Thirteen!"),  # shared
        qa("Say it", leaked.removesuffix(" thirteen")),  # twelve words only
        qa("李白", chinese[:13]),  # thirteen characters
        qa("李白", chinese[:12]),
        qa("Short: question", "short reply"),  # the same words, all of the row
        qa("short question?", "short reply and more"),
        qa("x", "y"),
    ]
    asked = [{"role": "user", "content": pair["prompt"]} for pair in pairs]
    replies = [{"role": "assistant", "content": pair["completion"]} for pair in pairs]
    train = [{"messages": [system, *turns]} for turns in zip(asked, replies, strict=True)]
    path, evaluation = rows_file(tmp_path / "train.jsonl", train), rows_file(tmp_path / "eval.jsonl", held_out)
    sources = [{"path": evaluation}]
    assert kept(path, {"decontaminate": 13}, eval_datasets=sources) == [2, 4, 6, 7]
    made = cleaned(path, {"decontaminate": 13}, eval_datasets=sources)
    assert made.used[0].dropped == {"shares 13 words in a row with an eval row": 3}
    assert made.used[1].dropped == {}
    assert len(made.eval) == 3


def test_rows_split_off_for_evaluation_count_as_eval_rows(tmp_path: Path) -> None:
    """Every row ends alike, so what stays to train on is none; without the shared end nothing goes."""
    rows = [qa(f"question {i}", f"reply {i} and then a sentence that all of them share") for i in range(40)]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"no row is left to train on; .*shares 5 words in a row with an eval row"):
        cleaned(path, {"decontaminate": 5}, eval_fraction=0.3)
    rows = [qa(f"question {i}", f"reply {i}") for i in range(40)]
    assert cleaned(rows_file(tmp_path / "rows.jsonl", rows), {"decontaminate": 5}, eval_fraction=0.3).used[0].used == 40


# Altogether.


def planted(tmp_path: Path) -> dict[str, Any]:
    """300 rows with 30 copies, 20 near copies, 10 contaminated, 5 too short, 4 German, 3 whose prompt leaks."""
    rng = random.Random(1)
    rows = [qa(f"{i} {english(rng)}", f"{english(rng)} {i}") for i in range(228)]
    good = rows[:50]
    leak = " ".join(f"benchmark{i}" for i in range(13))
    rows += [qa(row["prompt"].upper(), f" {row['completion']}") for row in good[:30]]
    rows += [qa(row["prompt"], f"{row['completion']} indeed") for row in good[30:50]]
    rows += [qa(row["prompt"], f"{row['completion']} {leak}") for row in rows[100:110]]
    rows += [qa(f"ok {i}", "yes") for i in range(5)]
    rows += [qa(f"Wie spät ist es gerade in Berlin, Nummer {i}?", "Es ist leider schon sehr spät.") for i in range(4)]
    held_out = [qa(f"held out {i}", f"a reply of {i} words that nobody else has given") for i in range(3)]
    rows += [qa(row["prompt"], f"another reply to question {i}, of course") for i, row in enumerate(held_out)]
    held_out.append(qa("benchmark", leak))
    clean = {"exact_duplicates": True, "near_duplicates": 0.8, "decontaminate": 13, "languages": ["en"], "min_words": 5}
    return {
        "path": rows_file(tmp_path / "rows.jsonl", rows),
        "clean": clean,
        "eval_datasets": [{"path": rows_file(tmp_path / "eval.jsonl", held_out)}],
    }


def test_everything_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, encoded = RowEncoder.block, Counter[str]()
    monkeypatch.setattr(RowEncoder, "block", lambda *rows: (encoded.update(rows[2]), block(*rows))[1])
    recipe = planted(tmp_path)
    used, held_out = cleaned(**recipe).used
    assert used.dropped == {
        "duplicate of an earlier row": 30,
        "near-duplicate of an earlier row (Jaccard 0.8 or more)": 20,
        "shares 13 words in a row with an eval row": 10,
        "fewer than 5 words": 5,
        "in another language (de)": 4,
        "its prompt is in eval_datasets": 3,
    }
    assert (used.rows, used.used, held_out.used) == (300, 228, 4)
    assert used.examples["duplicate of an earlier row"] == [f"{recipe['path']}:{229 + i}" for i in range(5)]
    assert sum(encoded.values()) == 228 + 3 + 4  # rows that are cleaned away are never tokenized
    assert encoded.keys() >= {f"{recipe['path']}:{number}" for number in range(1, 229)}
    one = cleaned(**recipe)
    more = cleaned(num_proc=3, **recipe)
    assert (more.train[:], more.eval[:], more.used) == (one.train[:], one.eval[:], one.used)


def test_a_row_that_is_left_out_is_nobodys_original(tmp_path: Path) -> None:
    """The first of three copies leaks, is contaminated or is too short: the second is the one that stays."""
    text = " ".join(sentence(random.Random(i)) for i in range(9))
    leak = " ".join(f"benchmark{i}" for i in range(13))
    evaluation = rows_file(tmp_path / "eval.jsonl", [qa(f"{text} q", "other"), qa("benchmark", leak)])
    near = {"near_duplicates": 0.7, "exact_duplicates": True, "decontaminate": 13}
    rows = [qa(f"{text} {leak}", text), qa(text, text), qa(text, text)]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    other = rows_file(tmp_path / "other.jsonl", [qa("unlike", "the others"), qa("benchmark", leak)])
    assert kept(path, near, eval_datasets=[{"path": other}]) == [2]
    rows = [qa(f"{text} q", text), qa(f"{text} Q r", text), qa(f"{text} r", text)]
    path = rows_file(tmp_path / "leaks.jsonl", rows)
    assert kept(path, {"near_duplicates": 0.7}, eval_datasets=[{"path": evaluation}]) == [2]


def test_the_sides_of_a_split_are_not_compared(tmp_path: Path) -> None:
    """Near-copies fall on both sides, of which each keeps its first."""
    text = " ".join(sentence(random.Random(i)) for i in range(15))
    path = rows_file(tmp_path / "rows.jsonl", [qa(f"{text} {i}", text) for i in range(30)])
    made = cleaned(path, {"near_duplicates": 0.7}, eval_fraction=0.5)
    assert (len(made.train), len(made.eval)) == (1, 1)
    assert made.train_origin["place"][:] != made.eval_origin["place"][:]


def test_bad_rows_and_formats_are_told_as_without_cleaning(tmp_path: Path) -> None:
    rows = [*[{"b": 1}] * 260, {"q": "a", "a": "b"}, {"q": "", "a": "b"}, {"q": "a", "a": "b"}]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    with Path(path).open("a") as file:
        file.write('\n{"q": \n')
    source = {"path": path, "columns": {"prompt": "q", "completion": "a"}}
    accounts = []
    for clean in (None, {}):
        section = DataSection(datasets=[source], on_bad_row="drop", clean=clean)
        (used,) = prepare(section, TOKENIZER, "conversation", seed=0).used
        accounts.append(used)
        with pytest.raises(DataError, match=r"rows\.jsonl:265: broken JSON"):
            prepare(section.model_copy(update={"on_bad_row": "error"}), TOKENIZER, "conversation", seed=0)
    assert accounts[1].dropped == accounts[0].dropped | {"duplicate of an earlier row": 1}
    assert (accounts[0].used, accounts[1].used) == (2, 1)


@pytest.mark.parametrize(
    ("clean", "expected"),
    [
        ({"decontaminate": 13}, "compares with rows to evaluate on: give `eval_datasets`"),
        ({"min_words": 9, "max_words": 8}, "`min_words` is above `max_words`"),
        ({"min_turns": 3, "max_turns": 2}, "`min_turns` is above `max_turns`"),
        ({"languages": ["english"]}, "languages.0"),
        ({"near_duplicates": 0.5}, "near_duplicates"),
    ],
)
def test_what_contradicts_itself_is_refused(clean: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        DataSection(datasets=[{"path": "x"}], clean=clean)


def test_documents_have_no_turns_and_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_file(tmp_path / "rows.jsonl", [{"text": sentence(random.Random(i))} for i in range(3)])
    with pytest.raises(DataError, match="documents have no turns"):
        cleaned(path, {"min_turns": 1}, "text")
    assert kept(path, {"exact_duplicates": True}, "text") == [1, 2, 3]
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DependencyError, match=r"pip install 'chatalign\[clean\]'"):
        cleaned(path, {"near_duplicates": 0.8}, "text")


def test_check_refuses_a_recipe_whose_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = {"near_duplicates": 0.8, "languages": ["en"]}
    raw = {"stage": "sft", "output_dir": "x", "model": {"name_or_path": "x"}}
    recipe = validate_stage(raw | {"data": {"datasets": [{"path": "x"}], "clean": clean}}, where="test")
    assert [finding.problem for finding in package_findings(recipe)] == [None, None]
    monkeypatch.setattr("chatalign.check.models.find_spec", lambda _: None)
    problems = [str(finding.problem) for finding in package_findings(recipe)]
    assert problems == [
        f"this recipe needs the package {package}; pip install 'chatalign[clean]'"
        for package in ("datasketch", "py3langid")
    ]
