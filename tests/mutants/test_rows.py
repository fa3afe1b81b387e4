"""Failures 8, 9, 10, 15, 16 and 17: cuts, kept tokens, splits and rows that spoil a run, planted and named."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from data.bad_rows import BAD
from data.chat_families import BY_NAME, CHATML_PLAIN, THINKING, tokenizer_of
from torch import distributed

from chatalign.data import encode, mixing, prepare, store
from chatalign.data.chat import Encoded, EncodedPair
from chatalign.errors import ChatalignError, GuardError
from chatalign.recipe import Recipe
from mutants.guard_table import named, says
from mutants.planted import CHATS, PAIRS, chatml, launch, problem_found, recipe_of, refusal, refused, write_rows

LONG = "what is the capital of France? " * 10
SAME_START = [{"prompt": "hello", "chosen": LONG + "Paris", "rejected": LONG + "London"}] * 3
KINDS = {"conversation": "sft", "preference": "dpo", "unpaired": "kto", "text": "pretrain", "prompt": "ppo"}


def prepared(recipe: Recipe, tokenizer: Any = None) -> Any:
    """The recipe's rows, as its stage prepares them."""
    kind: Any = next(kind for kind, stage in KINDS.items() if stage == recipe.stage)
    return prepare(recipe.data, tokenizer or tokenizer_of(BY_NAME["chatml_plain"]), kind, seed=0)  # type: ignore[union-attr]


# --- 8: truncation removes every target ----------------------------------------------------------------------------


def test_8_max_length_ends_before_the_replies(tmp_path: Path) -> None:
    rows = [{"prompt": LONG, "completion": "Paris"}] * 6 + [{"prompt": "hello", "completion": "world"}] * 2
    recipe = recipe_of(tmp_path, rows=rows, data={"max_length": 48})
    problem = problem_found(recipe)
    assert problem is not None
    assert "6 of 8" in str(problem)
    says(8, problem)
    with named(8):
        launch(recipe)


def test_8_a_cut_that_keeps_rows_without_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library cuts: the ids alone, with no look at what is left to learn."""
    monkeypatch.setattr(
        encode, "fit_conversation", lambda one, length, _: Encoded(one.ids[:length], one.supervised[:length], ())
    )
    with pytest.raises(GuardError, match="a row was kept of which no token is a target"):
        prepared(recipe_of(tmp_path, rows=[{"prompt": LONG, "completion": "Paris"}], data={"max_length": 16}))


# --- 9: truncation of pairs ----------------------------------------------------------------------------------------


def keep_start(pair: EncodedPair, max_length: int, *_: Any) -> EncodedPair:
    """TRL's truncation_mode "keep_start": the first tokens of prompt and reply together."""
    room = max(max_length - len(pair.prompt_ids), 0)
    return EncodedPair(pair.prompt_ids[:max_length], pair.chosen_ids[:room], pair.rejected_ids[:room])


def keep_end(pair: EncodedPair, max_length: int, *_: Any) -> EncodedPair:
    """A prompt cut at its end: the question itself goes, and the template's generation prompt."""
    return EncodedPair(pair.prompt_ids[: max_length // 2], pair.chosen_ids, pair.rejected_ids)


@pytest.mark.parametrize("cut", [keep_start, keep_end])
def test_9_a_cut_that_empties_a_side(cut: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "fit_pair", cut)
    pairs = [{"prompt": LONG, "chosen": "Paris", "rejected": "London"}]
    recipe = recipe_of(tmp_path, "dpo", rows=pairs, data={"max_length": 16})
    with named(9):
        launch(recipe)


def test_9_replies_that_differ_after_the_cut_only(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "dpo", rows=SAME_START, data={"max_length": 32})
    refused(recipe, "3 of 3 rows have nothing left to learn within data.max_length 32")


def test_9_our_cut_keeps_both_sides_and_the_prompts_end(tmp_path: Path) -> None:
    pairs = [{"prompt": LONG, "chosen": "Paris " * 30, "rejected": "London"}]
    row = prepared(recipe_of(tmp_path, "dpo", rows=pairs, data={"max_length": 24})).train[0]
    assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 24
    tokenizer = tokenizer_of(BY_NAME["chatml_plain"])
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert min(len(row["chosen_ids"]), len(row["rejected_ids"])) > 0


# --- 10: kept tokens that are no longer those of the rows ----------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokens are kept."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "chatalign"


def kept(home: Path) -> Path:
    """The one folder of kept tokens."""
    (folder,) = (path for path in home.iterdir() if path.is_dir())
    return folder


@pytest.mark.parametrize("change", ["template", "tokenizer", "rows", "code", "libraries"])
def test_10_a_key_that_leaves_something_out(
    change: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the cache of open-instruct 1518 did: the same folder for other tokens."""
    monkeypatch.setattr(store.TokensKey, "name", "0" * 64)
    recipe: Any = recipe_of(tmp_path)
    prepared(recipe, chatml())
    tokenizer = chatml(THINKING) if change == "template" else chatml()
    if change == "tokenizer":
        tokenizer = chatml(CHATML_PLAIN, "<|more|>")
    elif change == "rows":
        write_rows(tmp_path / "rows.jsonl", [*CHATS, *CHATS])
    elif change == "code":
        monkeypatch.setattr(store, "sha256_file", lambda path: "another")
    elif change == "libraries":
        monkeypatch.setattr(store.tokenizers, "__version__", "99")
    with named(10):
        prepared(recipe, tokenizer)


def flip_a_bit(folder: Path) -> None:
    file = folder / "train.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def unmark(folder: Path) -> None:
    """The rows again, with every target taken back."""
    file = folder / "train.arrow"
    table = pyarrow.ipc.open_stream(file.read_bytes()).read_all()
    marks = [[0] * len(row) for row in table.column("supervised").to_pylist()]
    at = table.schema.get_field_index("supervised")
    table = table.set_column(at, table.schema.field(at), pyarrow.array(marks, table.schema.field(at).type))
    with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("edit", [flip_a_bit, unmark])
def test_10_kept_tokens_that_were_altered(edit: Any, home: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    prepared(recipe)
    edit(kept(home))
    with pytest.raises(GuardError, match=r"train\.arrow: altered since it was written; delete .*/chatalign/\w{64} and"):
        prepared(recipe)
    shutil.rmtree(kept(home))
    assert any(prepared(recipe).train[0]["supervised"]), "as the error says, deleting mends it"


@pytest.mark.parametrize("broken", [None, "", "{}", '{"made_from": {}}'])
def test_10_a_seal_that_is_broken(broken: str | None, home: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    prepared(recipe)
    seal = kept(home) / store.SEAL
    seal.unlink() if broken is None else seal.write_text(broken)
    with pytest.raises(GuardError, match="start again"):
        prepared(recipe)


# --- 15: the split -------------------------------------------------------------------------------------------------


def test_15_training_rows_that_are_evaluated(tmp_path: Path) -> None:
    copy = write_rows(tmp_path / "copy.jsonl", CHATS[::-1])
    says(15, refusal(recipe_of(tmp_path, data={"eval_datasets": [{"path": str(copy)}]})))


def test_15_a_split_that_goes_by_chance(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `train_test_split` does: replies to one prompt fall on both sides."""
    rows = [{"prompt": f"question {i % 10}", "completion": f"reply {i}"} for i in range(60)]
    recipe = recipe_of(tmp_path, rows=rows, data={"eval_fraction": 0.3})
    assert len(prepared(recipe).eval) > 0
    shutil.rmtree(kept(home))
    drawn = random.Random(0)
    monkeypatch.setattr(mixing, "is_eval", lambda _, share: drawn.random() < share)
    with pytest.raises(GuardError, match=r"\d of \d+ prompts to evaluate on are trained on too"):
        prepared(recipe)


def test_15_a_split_that_differs_from_rank_to_rank(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"reply {i}"} for i in range(60)]
    recipe = recipe_of(tmp_path, rows=rows, data={"eval_fraction": 0.3})
    gathered: list[dict[str, str]] = []

    def gather(found: list[Any], mine: dict[str, str]) -> None:
        """Two processes, one after the other: the second gets what the first prepared."""
        gathered.append(mine)
        found[:] = [gathered[0], gathered[-1]]

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    prepared(recipe)
    prepared(recipe)
    shutil.rmtree(kept(home))
    right = mixing.is_eval
    monkeypatch.setattr(mixing, "is_eval", lambda digest, share: right(digest[::-1], share))
    with pytest.raises(GuardError, match=r"process 1 prepared other rows than process 0 \(sha256 of eval"):
        prepared(recipe)


# --- 16: malformed rows --------------------------------------------------------------------------------------------


def test_16_a_malformed_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "user", "content": "hello?"}]
    says(16, refusal(recipe_of(tmp_path, rows=[*CHATS, {"messages": turns}])))


@pytest.mark.parametrize(("kind", "row", "line"), BAD)
def test_16_each_malformed_row_is_named_where_it_stands(
    kind: str, row: dict[str, Any], line: str, tmp_path: Path
) -> None:
    error = refusal(recipe_of(tmp_path, KINDS[kind], rows=[row]))
    assert str(error) == f"{tmp_path / 'rows.jsonl'}:1: {line}"


# --- 17: pairs that teach nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_17_identical_replies(stage: str, tmp_path: Path) -> None:
    rows = [*PAIRS[:2], PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}]
    says(17, refusal(recipe_of(tmp_path, stage, rows=rows)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": " "}, ":3: rejected: is empty"),
        ({"chosen": ""}, ":3: chosen: is empty"),
        ({"chosen": None}, "chosen"),
    ],
)
def test_17_an_empty_side(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    error = refusal(recipe_of(tmp_path, "dpo", rows=[*PAIRS[:2], PAIRS[0] | change]))
    assert words in str(error)


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_17_replies_that_the_template_makes_equal(family: str, tmp_path: Path) -> None:
    """The template takes white space off: two replies in the file, one in the tokens, ln 2 for ever."""
    rows = [*PAIRS[:2], PAIRS[0] | {"rejected": PAIRS[0]["chosen"] + " \n"}]
    error = refusal(recipe_of(tmp_path, "dpo", rows=rows, tokenizer=tokenizer_of(BY_NAME[family])))
    assert ":3: rejected: is the same as chosen in the chat template" in str(error)


def test_17_two_prompts_in_a_pair(tmp_path: Path) -> None:
    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]

    pair = {"chosen": turns("hello", "yes"), "rejected": turns("goodbye", "no")}
    error = refusal(recipe_of(tmp_path, "dpo", rows=[pair]))
    assert "rejected: starts with another prompt than chosen" in str(error)


def test_17_no_pair_is_left(tmp_path: Path) -> None:
    rows = [PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}]
    with pytest.raises(ChatalignError, match=r"not one of 1 rows is good|no row is left"):
        launch(recipe_of(tmp_path, "dpo", rows=rows, data={"on_bad_row": "drop"}))
