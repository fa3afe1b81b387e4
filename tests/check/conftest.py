"""A tiny model with its tokenizer on disk, rows, and a recipe that is right: what each test spoils."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import CHATML_PLAIN, make_llama, make_tokenizer

from chatalign.check import Finding
from chatalign.preflight import check_file

Check = Callable[..., dict[str, list[Finding]]]


def question(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"it is {i}."}]}


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": "no"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(CHATML_PLAIN)
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a copy of the model, 20 rows of two kinds and an sft recipe."""
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # no accelerate configuration of this machine's
    shutil.copytree(tiny_model, tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [question(i) for i in range(20)])
    write_rows(tmp_path / "pairs.jsonl", [pair(i) for i in range(20)])
    write_recipe(tmp_path / "sft.yaml")
    return tmp_path


def write_recipe(path: Path, **changes: Any) -> Path:
    recipe = {
        "stage": "sft",
        "output_dir": "runs/x",
        "model": {"name_or_path": "model"},
        "data": {"datasets": [{"path": "rows.jsonl"}], "max_length": 64},
    }
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


@pytest.fixture
def check(place: Path) -> Check:
    """The findings of a recipe by their subject, after key=value overrides."""

    def findings(*overrides: str, recipe: str = "sft.yaml", **settings: Any) -> dict[str, list[Finding]]:
        report = check_file(recipe, overrides, **settings)
        found: dict[str, list[Finding]] = {}
        for finding in [*report.findings, *(one for _, ones in report.recipes.values() for one in ones)]:
            found.setdefault(finding.check, []).append(finding)
        return found

    return findings


def only(found: list[Finding], status: str) -> str:
    """The text of the one finding with this status."""
    (finding,) = [finding for finding in found if finding.status == status]
    return str(finding.problem or finding.note or finding.what)
