"""Whole files planted bad: each is one line at its row, before a model loads; dropped rows are counted and named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from bad_files import FILES, GOOD, BadFile, lines
from chat_families import BY_NAME, tokenizer_of

from chatalign.data import check_data, json_files, prepare
from chatalign.data.files import read_file
from chatalign.data.json_values import JsonReader
from chatalign.errors import DataError
from chatalign.launch import execute
from chatalign.recipe import DataSection

TOKENIZER = tokenizer_of(BY_NAME["chatml"])
STAGE_OF = {"conversation": "sft", "text": "pretrain", "preference": "dpo"}
files = pytest.mark.parametrize("bad", FILES, ids=lambda bad: bad.title.replace(" ", "-"))


def section(path: Path, **settings: Any) -> DataSection:
    return DataSection(datasets=[{"path": str(path)}], **settings)


def says(bad: BadFile, path: Path, line: str) -> bool:
    """Whether a line is the one that the table promises, and one line."""
    return re.fullmatch(".*".join(map(re.escape, f"{path}{bad.line}".split("…"))), line) is not None


def test_there_are_enough() -> None:
    assert len(FILES) >= 100
    assert len({bad.title for bad in FILES}) == len(FILES)


@files
def test_the_check_names_file_row_and_mend(bad: BadFile, tmp_path: Path) -> None:
    path = bad.write(tmp_path)
    problems = check_data(section(path), bad.kind)
    assert says(bad, path, problems[0]), problems[0]
    assert not any("\n" in problem for problem in problems)
    kept = check_data(section(path, on_bad_row="drop"), bad.kind)
    assert len(kept) == (0 if bad.good else 1)


@files
def test_bad_rows_are_dropped_counted_and_named(bad: BadFile, tmp_path: Path) -> None:
    path = bad.write(tmp_path)
    if not bad.good:
        with pytest.raises(DataError) as caught:
            prepare(section(path, on_bad_row="drop"), TOKENIZER, bad.kind, seed=0)
        assert str(path) in str(caught.value)
        return
    made = prepare(section(path, on_bad_row="drop"), TOKENIZER, bad.kind, seed=0)
    used = made.used[0]
    assert (used.used, used.dropped) == (bad.good, bad.dropped)
    assert len(made.train) == bad.good
    assert used.rows == bad.good + sum(bad.dropped.values())
    assert {reason: len(places) for reason, places in used.examples.items()} == {
        reason: min(count, 5) for reason, count in bad.dropped.items()
    }
    first = check_data(section(path), bad.kind)[0]
    assert any(first.startswith(f"{place}: ") for places in used.examples.values() for place in places)


@files
def test_a_launch_refuses_before_a_model_loads(bad: BadFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def loads(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("a model or tokenizer was loaded")

    for loader in (transformers.PreTrainedModel, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", loads)
    path = bad.write(tmp_path)
    recipe = tmp_path / "recipe.json"  # JSON is YAML
    settings = {"model": {"name_or_path": "data/pocket/base"}, "output_dir": str(tmp_path / "run")}
    stage = STAGE_OF[bad.kind]
    recipe.write_text(json.dumps({"stage": stage, **settings, "data": {"datasets": [{"path": str(path)}]}}))
    with pytest.raises(DataError) as caught:
        execute(stage, lambda _: pytest.fail("the stage began"), str(recipe), [])
    assert says(bad, path, re.sub(r" \(\d+ more such problems\)$", "", str(caught.value)))
    assert not (tmp_path / "run").exists()


UNUSUAL = {
    "a byte order mark": ("f.jsonl", b"\xef\xbb\xbf" + lines(GOOD, GOOD)),
    "CRLF": ("f.jsonl", lines(GOOD, GOOD).replace(b"\n", b"\r\n")),
    "no line end at the end": ("f.jsonl", lines(GOOD, GOOD)[:-1]),
    "blank lines": ("f.jsonl", b"\n" + lines(GOOD, "", " ", GOOD)),
    "JSON lines named .json": ("f.json", lines(GOOD, GOOD)),
    "a list in an object": ("f.json", f'{{"version": 1, "rows": [{GOOD}, {GOOD}], "tags": ["a"]}}'.encode()),
    "escapes": ("f.jsonl", lines(GOOD, GOOD.replace("hello", r"\ud83d\ude00 \u00e9 \"\\ \u2028"))),
    "another column": ("f.jsonl", lines(GOOD, GOOD[:-1] + r', "meta": "\u0000\ud800", "scores": [0.5, 1e9]}')),
    "an index without a name": ("f.csv", b',prompt,completion\r\n0,"a\n""b""",c\r\n\r\n1,d,e\r\n'),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_only_unusual_is_taken(name: str, tmp_path: Path) -> None:
    file, content = UNUSUAL[name]
    (tmp_path / file).write_bytes(content)
    assert check_data(section(tmp_path / file), "conversation") == []
    assert len(prepare(section(tmp_path / file), TOKENIZER, "conversation", seed=0).train) == 2


def test_a_row_of_ten_megabytes_is_decoded_a_few_times_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a list, which is read in chunks: to decode anew at each chunk would read it a hundred times over."""
    decoded: list[int] = []
    at = JsonReader.at

    def spy(self: JsonReader, text: str, start: int) -> tuple[Any, int]:
        decoded.append(len(text) - start)
        return at(self, text, start)

    monkeypatch.setattr(JsonReader, "at", spy)
    monkeypatch.setattr(json_files, "_CHUNK", 1 << 15)
    path = tmp_path / "f.json"
    long = json.dumps({"text": "a word and another " * 550_000})
    path.write_text(f'[{{"text": "short"}}, {long}, {{"text": "short"}}]')
    part, problems = read_file(path)
    assert (part.count, problems) == (3, [])
    assert path.stat().st_size > 10_000_000
    assert sum(decoded) < 4 * path.stat().st_size
    assert check_data(section(path), "text") == []


def test_a_list_that_breaks_off_early_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    text_chunks = json_files._text_chunks

    def spy(file: Any) -> Iterator[str]:
        for text in text_chunks(file):
            read.append(len(text))
            yield text

    monkeypatch.setattr(json_files, "_CHUNK", 1 << 10)
    monkeypatch.setattr(json_files, "_text_chunks", spy)
    path = tmp_path / "f.json"
    path.write_text("[" + ",\n".join([GOOD, "{'a': 1}", *[GOOD] * 2000]) + "]")
    with pytest.raises(DataError, match=r"f\.json:2: broken JSON \(Expecting property name.*, line 2 column 2\)"):
        read_file(path)
    assert sum(read) < path.stat().st_size / 10
