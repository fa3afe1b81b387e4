"""What kept tokens are keyed by, and processes that share them: one writes, a killed one leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch  # noqa: F401 - so that forked processes needn't import it
from chat_families import BY_NAME, CHATML, make, tokenizer_of

from chatalign.data import preparation, prepare, store
from chatalign.data.store import TokensKey, stored
from chatalign.recipe import CleanSection, DataSection, DatasetSource

TOKENIZER = tokenizer_of(BY_NAME["chatml"])
FORK = get_context("fork")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "chatalign"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "completion": "yes"}) + "\n" for i in range(9)))
    return str(path)


class Asked(Exception):
    """Raised in place of preparing, with the key."""


def ask(key: TokensKey, _: Callable[[Path], None]) -> Path:
    raise Asked(key.name)


def key_of(monkeypatch: pytest.MonkeyPatch, section: DataSection, tokenizer: Any = TOKENIZER, **more: Any) -> str:
    """The key that `prepare` asks the store for."""
    monkeypatch.setattr(preparation, "stored", ask)
    with pytest.raises(Asked) as asked:
        prepare(section, tokenizer, seed=0, **{"kind": "conversation"} | more)
    return str(asked.value)


# Another value for each key; those that no token depends on are told apart.
SECTION: dict[str, Any] = {
    "eval_fraction": 0.5,
    "max_length": 512,
    "max_prompt_length": 99,
    "on_overlong": "drop",
    "on_bad_row": "drop",
    "supervise": "all",
    "apply_chat_template": False,
    "clean": {},
}
NO_TOKEN_DEPENDS_ON = {"num_proc": 2, "packing": False}
SOURCE: dict[str, Any] = {
    "name": "main",
    "split": "test",
    "revision": "v1",
    "format": "prompt_completion",
    "columns": {"prompt": "prompt"},
    "roles": {"human": "user"},
    "weight": 2.0,
    "max_rows": 5,
    "system": "Be kind.",
}
CLEAN: dict[str, Any] = {
    "exact_duplicates": False,
    "near_duplicates": 0.8,
    "decontaminate": 13,
    "languages": ["en"],
    "min_words": 2,
    "max_words": 99,
    "min_turns": 2,
    "max_turns": 9,
}


def test_every_data_key_changes_the_key(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new field of the section is a new line above."""
    assert (
        SECTION.keys() | NO_TOKEN_DEPENDS_ON.keys() | {"datasets", "eval_datasets"} == DataSection.model_fields.keys()
    )
    assert SOURCE.keys() | {"path"} == DatasetSource.model_fields.keys()
    assert CLEAN.keys() == CleanSection.model_fields.keys()
    base: dict[str, Any] = {"datasets": [{"path": rows}], "eval_datasets": [{"path": rows}]}
    sections = [base, base | {"clean": {}}, base | {"eval_datasets": []}, base | {"datasets": base["datasets"] * 2}]
    sections += [base | {name: value} for name, value in SECTION.items() if name != "clean"]
    sections += [base | {"datasets": [{"path": rows, name: value}]} for name, value in SOURCE.items()]
    sections += [base | {"clean": {name: value}} for name, value in CLEAN.items()]
    keys = [key_of(monkeypatch, DataSection(**one)) for one in sections]
    assert len(set(keys)) == len(sections)
    for name, value in NO_TOKEN_DEPENDS_ON.items():
        assert key_of(monkeypatch, DataSection(**base | {name: value})) == keys[0]


def test_rows_tokenizer_template_kind_libraries_and_code_change_the_key(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = DataSection(datasets=[{"path": rows}], clean={"near_duplicates": 0.8})
    keys = [key_of(monkeypatch, section)]
    more_words = make(CHATML, "<|im_end|>", special=("<|im_start|>", "<|more|>"))
    other_template = make(CHATML + "{# another #}", "<|im_end|>", special=("<|im_start|>",))
    keys += [key_of(monkeypatch, section, tokenizer) for tokenizer in (more_words, other_template)]
    keys.append(key_of(monkeypatch, section, kind="prompt"))
    keys.append(key_of(monkeypatch, section, eos_for_text=False))
    with monkeypatch.context() as patch:
        patch.setattr(store.tokenizers, "__version__", "0.0")
        keys.append(key_of(patch, section))
    with monkeypatch.context() as patch:
        patch.setattr("chatalign.data.cleaning.version", lambda _: "0.0")
        keys.append(key_of(patch, section))
    code = shutil.copytree(Path(store.__file__).parent, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(store, "__file__", str(code / "store.py"))
    assert key_of(monkeypatch, section) == keys[0]
    with (code / "turns.py").open("a") as file:
        file.write("# another rule\n")
    keys.append(key_of(monkeypatch, section))
    with Path(rows).open("a") as file:
        file.write('{"prompt": "one more", "completion": "yes"}\n')
    keys.append(key_of(monkeypatch, section))
    assert len(set(keys)) == len(keys) == 9


def in_processes(*work: Callable[[], Any]) -> list[int | None]:
    """Exit codes of functions that run at once, each in a process of its own."""
    processes = [FORK.Process(target=one) for one in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_of_processes_that_prepare_at_once_one_writes(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def write(folder: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} writes\n")
        time.sleep(0.2)  # the others are at the door by now
        (folder / "train.arrow").write_text("whole")

    def use() -> None:
        folder = stored(TokensKey({"rows": "a"}), write)
        with log.open("a") as file:
            file.write(f"{os.getpid()} reads {(folder / 'train.arrow').read_text()}\n")

    assert in_processes(use, use, use) == [0, 0, 0]
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert [what for _, what in lines] == ["writes", *["reads whole"] * 3]
    assert len({pid for pid, what in lines if what.startswith("reads")}) == 3


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(
    home: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed where half of the files are there: the lock is free, the next process writes all, and sweeps up."""
    section = DataSection(datasets=[{"path": rows}], eval_fraction=0.5, clean={"near_duplicates": 0.8})

    def die_writing() -> None:
        monkeypatch.setattr(preparation, "write_json", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        prepare(section, TOKENIZER, "conversation", seed=0)

    assert in_processes(die_writing) == [-signal.SIGKILL]
    (half,) = [path for path in home.iterdir() if path.is_dir()]
    assert half.name.startswith(".")
    assert {path.name for path in half.iterdir()} >= {"train.arrow", "eval.arrow"}
    made = prepare(section, TOKENIZER, "conversation", seed=0)
    assert made.eval is not None
    assert len(made.train) + len(made.eval) == 9
    (whole,) = [path for path in home.iterdir() if path.is_dir()]
    assert not whole.name.startswith(".")
