"""What a pipeline has done beside its training: reports written and rows tokenized, or done in their turn."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest

import chatalign.report
from chatalign import dpo, sft
from chatalign.beside import Beside, _prepare_rows, _Worker
from chatalign.errors import ChatalignError, DataError
from chatalign.recipe import Recipe, validate_stage

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "thank you"}]
PAIR = {"prompt": "hello", "chosen": "thank you", "rejected": "world"}


def fail_on(number: int) -> int:
    if number < 0:
        raise DataError(f"{number}: below 0; give another")
    return number


def where(folder: str) -> str:
    """A stand-in for a report: who wrote it."""
    Path(folder, "report.md").write_text(str(os.getpid()))
    return f"{folder}/report.md"


def test_a_worker_answers_in_order_and_ends_when_asked() -> None:
    worker = _Worker()
    for number in (1, -2, 3):
        worker.submit(fail_on, number)
    assert worker.answer() == 1
    with pytest.raises(ChatalignError, match=r"^-2: below 0; give another$"):
        worker.answer()
    assert worker.answer() == 3
    worker.stop()
    assert worker._process.exitcode == -signal.SIGTERM


@pytest.mark.parametrize("killed", [False, True])
def test_every_report_is_written(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chatalign.report, "write_run_report", where)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    first = recipes(tmp_path, tmp_path)["sft"]
    with Beside({"sft": first}) as beside:
        beside.begin(first)
        assert beside._reports is not None
        if killed:
            os.kill(beside._reports._process.pid, signal.SIGKILL)
            beside._reports._process.join()
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            beside.report(str(tmp_path / name))
        beside.wait()
    writers = {int((tmp_path / name / "report.md").read_text()) for name in ("a", "b")}
    assert (writers == {os.getpid()}) == killed
    assert capsys.readouterr().out.split() == [
        "report:",
        f"{tmp_path}/a/report.md",
        "report:",
        f"{tmp_path}/b/report.md",
    ]


def test_with_one_core_reports_are_written_in_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatalign.report, "write_run_report", where)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    first = recipes(tmp_path, tmp_path)["sft"]
    with Beside({"sft": first}) as beside:
        beside.begin(first)
        beside.report(str(tmp_path))
        assert (tmp_path / "report.md").read_text() == str(os.getpid())
        beside.wait()


def recipes(folder: Path, model: Path) -> dict[str, Recipe]:
    """sft, and dpo of what it makes."""
    (folder / "turns.jsonl").write_text(f"{json.dumps({'messages': TURNS})}\n" * 4)
    (folder / "pairs.jsonl").write_text(f"{json.dumps(PAIR)}\n" * 4)
    made: dict[str, Recipe] = {}
    for stage, rows, start in (("sft", "turns", str(model)), ("dpo", "pairs", str(folder / "sft"))):
        raw: dict[str, Any] = {
            "stage": stage,
            "output_dir": str(folder / stage),
            "model": {"name_or_path": start},
            "data": {"datasets": [{"path": str(folder / f"{rows}.jsonl")}], "max_length": 32},
            "train": {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True},
        }
        made[stage] = validate_stage(raw, where="test")
    return made


@pytest.mark.slow
def test_a_later_stage_finds_its_rows_tokenized(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before what it starts from is there: with the tokenizer that the first stage is given."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    stages = recipes(tmp_path, tiny_model_folder)
    _prepare_rows(stages["dpo"], stages)
    kept = tmp_path / "cache" / "chatalign"
    (ahead,) = [path for path in kept.iterdir() if path.is_dir()]
    written = ahead.stat().st_mtime_ns
    sft.run(stages["sft"])
    dpo.run(stages["dpo"])
    folders = [path for path in kept.iterdir() if path.is_dir()]
    assert len(folders) == 2
    assert ahead in folders
    assert ahead.stat().st_mtime_ns == written


def test_what_is_wrong_with_rows_is_left_to_their_stage(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    stages = recipes(tmp_path, tiny_model_folder)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "hello"}\n')
    _prepare_rows(stages["dpo"], stages)
    assert not [path for path in (tmp_path / "cache" / "chatalign").glob("*") if path.is_dir()]
