"""Tracking: the metrics file through a real Trainer, resumes, trackers, the progress lines."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Trainer, TrainerState, TrainingArguments

from chatalign import tracking
from chatalign.errors import DependencyError
from chatalign.metrics_file import read_metrics
from chatalign.recipe import validate_stage
from chatalign.runs import Run


def recipe_in(folder: Path, tracker: str = "none") -> Any:
    raw = {"stage": "sft", "output_dir": str(folder), "data": {"datasets": [{"path": "rows.jsonl"}]}}
    return validate_stage(raw | {"tracking": tracker, "run_name": "a-run"}, where="test")


def run_in(folder: Path) -> Run:
    return Run(folder=folder, run_id="0123456789ab", fingerprint="f", parents=[])


def train(folder: Path, tracker: str = "none", steps: int = 4) -> None:
    """A real Trainer on one linear layer, logging every step."""
    recipe = recipe_in(folder, tracker)
    model = torch.nn.Linear(2, 1)
    model.forward = lambda x: {"loss": torch.nn.functional.linear(x, model.weight).pow(2).mean()}  # type: ignore
    rows = [{"x": torch.tensor([float(i), 1.0])} for i in range(steps)]
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        report_to=tracking.report_to(recipe),
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=1,
        num_train_epochs=1,
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    tracking.attach(trainer, recipe, run_in(folder))
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert not {"ProgressCallback", "PrinterCallback"} & set(names)
    trainer.train()


def arguments(*, eval_on_start: bool = False) -> Any:
    return SimpleNamespace(eval_on_start=eval_on_start)


def state_at(step: int, max_steps: int = 100) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps, epoch=step / 10)


def test_a_trainer_writes_a_line_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert {"epoch", "time_s", "grad_norm", "learning_rate"} <= set(lines[0])
    assert lines[-1]["train_loss"] >= 0
    assert [line["time_s"] for line in lines] == sorted(line["time_s"] for line in lines)
    shown = capsys.readouterr()
    assert "sft 4/4 · loss" in shown.err
    assert "{'loss'" not in shown.out + shown.err


def test_a_resume_drops_what_lies_beyond_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written = [{"step": step, "time_s": 10.0 * step, "loss": 1.0} for step in (5, 10, 15, 20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in written) + '{"step": 25, "lo')
    callback = tracking.MetricsFile(path)
    callback.on_train_begin(arguments(), state_at(10), None)  # type: ignore[arg-type]
    callback.on_log(None, state_at(15), None, logs={"loss": 0.5})  # type: ignore[arg-type]
    lines = read_metrics(path)
    assert [(line["step"], line["loss"]) for line in lines] == [(5, 1.0), (10, 1.0), (15, 0.5)]
    assert lines[-1]["time_s"] >= 100.0
    callback.on_train_begin(arguments(), state_at(0), None)  # type: ignore[arg-type]
    assert read_metrics(path) == []


def test_an_evaluation_that_is_made_again_is_logged_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "eval_loss": 3.0}\n{"step": 10, "loss": 1.0}\n{"step": 10, "eval_loss": 2.0}\n')
    callback = tracking.MetricsFile(path)
    callback.on_train_begin(arguments(eval_on_start=True), state_at(10), None)  # type: ignore[arg-type]
    assert read_metrics(path) == [{"step": 5, "eval_loss": 3.0}, {"step": 10, "loss": 1.0}]


def test_each_line_is_on_disk_at_once_and_is_json(tmp_path: Path) -> None:
    callback = tracking.MetricsFile(tmp_path / "metrics.jsonl")
    callback.on_train_begin(arguments(), state_at(0), None)  # type: ignore[arg-type]
    logs = {"loss": math.nan, "ratio": math.inf, "score": torch.tensor(1.5), "text": "你好"}
    callback.on_log(None, state_at(1), None, logs=logs)  # type: ignore[arg-type]
    line = json.loads((tmp_path / "metrics.jsonl").read_text("utf-8"), parse_constant=pytest.fail)
    assert (line["loss"], line["ratio"], line["score"], line["text"]) == (None, None, 1.5, "你好")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    callback = tracking.MetricsFile(tmp_path / "metrics.jsonl")
    state = state_at(0)
    state.is_world_process_zero = False
    callback.on_train_begin(None, state, None)  # type: ignore[arg-type]
    callback.on_log(None, state, None, logs={"loss": 1.0})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_plain_lines_are_sparse() -> None:
    out = io.StringIO()
    bar = tracking.ProgressBar("ppo", Console(file=out, width=200))
    bar.on_train_begin(None, state_at(0), None)  # type: ignore[arg-type]
    for step in range(1, 101):
        logs = {"loss": 0.25, "objective/kl": 1.5, "tokens_per_s": 12345.6}
        bar.on_log(None, state_at(step), None, logs=logs)  # type: ignore[arg-type]
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1] == "ppo 100/100 · loss 0.2500 · kl 1.500 · 12,346 tok/s · 0:00 left"


def test_the_bar_in_a_terminal() -> None:
    out = io.StringIO()
    bar = tracking.ProgressBar("sft", Console(file=out, force_terminal=True, width=120))
    bar.on_train_begin(None, state_at(0), None)  # type: ignore[arg-type]
    bar.on_step_end(None, state_at(50), None)  # type: ignore[arg-type]
    bar.on_log(None, state_at(50), None, logs={"loss": 0.25})  # type: ignore[arg-type]
    bar.on_train_end(None, state_at(100), None)  # type: ignore[arg-type]
    shown = out.getvalue()
    assert "100/100" in shown
    assert "loss 0.2500" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_missing_tracker_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.report_to(recipe_in(tmp_path)) == []
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"`tracking: wandb`.*chatalign\[wandb\]"):
        tracking.report_to(recipe_in(tmp_path, "wandb"))
    with pytest.raises(DependencyError, match="pip install trackio"):
        tracking.report_to(recipe_in(tmp_path, "trackio"))


def test_tensorboard_files_go_under_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    train(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_wandb_offline_writes_a_run_a_stage_under_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("sft", "dpo"):  # two stages in one process: two runs
        train(tmp_path / name, "wandb", steps=2)
    wandb.finish()
    for name in ("sft", "dpo"):
        logged = list((tmp_path / name / "wandb").glob("offline-run-*/run-0123456789ab.wandb"))
        assert len(logged) == 1
        assert logged[0].stat().st_size > 0


def test_a_wandb_that_is_down_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    modes = []

    def init(*, mode: str = "online", **settings: Any) -> str:
        modes.append(mode)
        if mode == "online":  # what the client raises after its own retries
            raise wandb.errors.CommError("Timed out while retrying:\nconnection refused")
        return f"{mode} run {settings['id']}"

    monkeypatch.setattr(wandb, "init", init)
    assert tracking.open_wandb(recipe_in(tmp_path, "wandb"), run_in(tmp_path)) == "offline run 0123456789ab"
    assert modes == ["online", "offline"]
    assert "wandb can't be reached (Timed out while retrying: connection refused)" in caplog.text


def test_a_speed_or_key_metric_is_shown_where_it_is_logged() -> None:
    assert tracking.summary_of("reward", {"loss": 0.5, "accuracy": 0.75}) == "loss 0.5000 · accuracy 0.750"
    assert tracking.summary_of("sft", {"eval_loss": 0.5}) == ""
    assert tracking.clock(3725) == "1:02:05"
    assert tracking.clock(59) == "0:59"
