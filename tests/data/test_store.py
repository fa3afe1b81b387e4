"""Prepared tokens are kept by what they depend on, whole or not at all; files are read without holding them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_families import BY_NAME, CHATML, make, tokenizer_of

from chatalign.data import json_files, prepare, store
from chatalign.data.encode import RowEncoder
from chatalign.data.files import read_file
from chatalign.data.store import TokensKey, stored
from chatalign.errors import DataError
from chatalign.recipe import DataSection

TOKENIZER = tokenizer_of(BY_NAME["chatml"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "chatalign"


def kept(home: Path) -> set[str]:
    return {path.name for path in home.iterdir() if path.is_dir()}


def rows_file(path: Path, count: int = 3, reply: str = "yes") -> str:
    rows = [{"prompt": f"question {i % 50}", "completion": f"{reply} {i % 50}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def section(path: str, **settings: Any) -> DataSection:
    return DataSection(datasets=[{"path": path}], **settings)


def test_rows_that_were_prepared_are_not_encoded_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 40)
    first = prepare(section(path, eval_fraction=0.3), TOKENIZER, "conversation", seed=0)
    monkeypatch.setattr(RowEncoder, "block", lambda *_: pytest.fail("encoded again"))
    again = prepare(section(path, eval_fraction=0.3, num_proc=2), TOKENIZER, "conversation", seed=1)
    assert again.train[:] == first.train[:]
    assert again.eval is not None
    assert first.eval is not None
    assert again.eval[:] == first.eval[:]
    assert again.used == first.used


def test_the_key_is_all_that_tokens_depend_on(home: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl")
    other_template = make(CHATML.replace("user", "person"), "<|im_end|>", special=("<|im_start|>", "<|more|>"))
    expected = 0
    for settings, tokenizer in [
        ({}, TOKENIZER),
        ({"max_length": 8, "on_overlong": "drop", "supervise": "all"}, TOKENIZER),
        ({}, other_template),
    ]:
        try:
            prepare(section(path, **settings), tokenizer, "conversation", seed=0)
            expected += 1
        except DataError:
            assert settings
        assert len(kept(home)) == expected
    rows_file(tmp_path / "rows.jsonl", reply="no")
    made = prepare(section(path), TOKENIZER, "conversation", seed=0)
    assert "no 0" in TOKENIZER.decode(made.train[0]["input_ids"])
    prepare(section(path), TOKENIZER, "prompt", seed=0)
    assert len(kept(home)) == expected + 2


def test_a_failed_preparation_leaves_nothing(home: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 3, reply="why " * 60)
    for _ in range(2):
        with pytest.raises(DataError, match="longer than max_length"):
            prepare(section(path, max_length=16, on_overlong="error"), TOKENIZER, "conversation", seed=0)
        assert kept(home) == set()


def test_without_caching_nothing_is_kept(home: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl")
    datasets.disable_caching()
    try:
        assert len(prepare(section(path), TOKENIZER, "conversation", seed=0).train) == 3
    finally:
        datasets.enable_caching()
    assert not home.exists()


def test_a_cache_that_cant_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(DataError, match="set HF_DATASETS_CACHE to a folder with space"):
        stored(TokensKey({}), lambda folder: None)


def test_memory_does_not_grow_with_the_rows(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python holds at its most: five times the rows take no third more."""
    monkeypatch.setattr(store, "_BATCH", 250)  # what waits to be written
    peaks = []
    for count in (500, 500, 2500):
        path = rows_file(tmp_path / "rows.jsonl", count, reply="yes and no " * 20)
        datasets.disable_caching()
        tracemalloc.start()
        prepare(section(path), TOKENIZER, "conversation", seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        datasets.enable_caching()
    assert peaks[2] < 1.33 * peaks[1]  # the first run also imports


JSON = {
    "rows.json": [{"a": "é" * 30, "b": [1, {"c": "]"}]}, {"a": '\\ " , {'}, {}],
    "empty.json": [],
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", JSON)
def test_a_json_list_is_read_in_chunks(name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_CHUNK", chunk)
    path = tmp_path / name
    for indent in (None, 2):
        path.write_text(json.dumps(JSON[name], ensure_ascii=False, indent=indent), "utf-8")
        part, problems = read_file(path)
        assert [row for _, row in part] == JSON[name]
        assert (part.count, problems) == (len(JSON[name]), [])


@pytest.mark.parametrize(
    "text", ['[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[{"a": 1}] x', '[{"a": 1}', "[,]", '[{"a": 1}}']
)
def test_what_json_refuses_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(DataError, match="broken JSON"):
        read_file(path)


def test_a_list_with_other_things_names_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, 3, {"a": 2}]')
    part, problems = read_file(path)
    assert list(part) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]
    assert [str(row) for row in problems] == [f"{path}:2: holds an int, not an object → mend or delete this row"]
