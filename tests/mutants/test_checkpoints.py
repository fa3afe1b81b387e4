"""Failures of checkpoints: a run goes on from one that is whole and its own, and sees what it has yet to see."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from engine.stand_ins import lm_rows, make_trainer
from ppo import conftest
from ppo.conftest import Make, built

from chatalign import checkpoint
from chatalign.engine import batching
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.ppo_state import LISTS_FILE
from chatalign.engine.weights import TRAINABLE_FILE
from chatalign.errors import CheckpointError, OtherRunError
from mutants.guard_table import named, says

make_recipe, prompt_file, reward_file = conftest.make_recipe, conftest.prompt_file, conftest.reward_file
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
    "logging_steps": 1,
}
ROWS = 12  # six micro-batches an epoch


def trainer_in(folder: Path, rows: Any = None, **settings: Any) -> LmTrainer:
    return make_trainer(folder, lm_rows(ROWS) if rows is None else rows, **(SETTINGS | settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LmTrainer:
    """A run of twelve steps with a checkpoint at every second."""
    trainer = trainer_in(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def copy_of(run: LmTrainer, folder: Path) -> Path:
    """The run's checkpoints, to be spoilt, where a new trainer in `folder` looks for them."""
    checkpoints = trainer_in(folder).run.checkpoints
    shutil.copytree(run.run.checkpoints, checkpoints, dirs_exist_ok=True)
    return checkpoints


def go_on(folder: Path, step: int, **settings: Any) -> LmTrainer:
    trainer = trainer_in(folder, **settings)
    trainer.train(resume_from_checkpoint=str(trainer.run.checkpoints / f"checkpoint-{step}"))
    return trainer


def test_an_intact_checkpoint_is_gone_on_from(whole: LmTrainer, tmp_path: Path) -> None:
    copy_of(whole, tmp_path)
    resumed = go_on(tmp_path, 8)
    assert resumed.seen is not None
    assert whole.seen is not None
    assert resumed.seen.state_dict() == whole.seen.state_dict()
    assert resumed.seen.count == 2 * ROWS
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


# 47: what a resumed run is shown


@pytest.mark.parametrize("step", [4, 8])
def test_a_library_that_skips_nothing(
    whole: LmTrainer, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(whole, tmp_path)
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", lambda loader, *_: loader)
    with named(47):
        go_on(tmp_path, step)


def test_an_order_that_another_version_shuffles(
    whole: LmTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(whole, tmp_path)
    monkeypatch.setattr(batching.torch, "randperm", lambda n, **_: torch.arange(n))
    with named(47):
        go_on(tmp_path, 4)


@pytest.mark.parametrize("settings", [{"data_seed": 5}, {"per_device_train_batch_size": 3}])
def test_another_seed_or_batch(whole: LmTrainer, tmp_path: Path, settings: dict[str, Any]) -> None:
    copy_of(whole, tmp_path)
    with named(47):
        go_on(tmp_path, 8, **settings)


def test_rows_that_another_tokenizer_made(whole: LmTrainer, tmp_path: Path) -> None:
    copy_of(whole, tmp_path)
    other = lm_rows(ROWS).map(lambda row: {"input_ids": [*row["input_ids"][:-1], 4]})
    with named(47):
        go_on(tmp_path, 4, rows=other)


def test_a_checkpoint_that_does_not_say(whole: LmTrainer, tmp_path: Path) -> None:
    manifest = copy_of(whole, tmp_path) / "checkpoint-4" / checkpoint.MANIFEST
    sealed = json.loads(manifest.read_text("utf-8"))
    sealed["extra"]["stage"] = {}  # as one from before the order was kept
    manifest.write_text(json.dumps(sealed), "utf-8")
    with named(47):
        go_on(tmp_path, 4)


def test_a_ppo_rollout_of_other_prompts(make_recipe: Make) -> None:
    each_step = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    over = {"train": each_step, "ppo": {"total_episodes": 8}}
    trainer = built(make_recipe("run", over))
    trainer.train()
    first = trainer.run.checkpoints / "checkpoint-1"
    lists = json.loads((first / LISTS_FILE).read_text("utf-8"))
    lists["prompt_ids"] = lists["prompt_ids"][::-1]  # the same prompts, and another shuffle's order
    (first / LISTS_FILE).write_text(json.dumps(lists), "utf-8")
    with named(47):
        built(make_recipe("other", over)).train(resume_from_checkpoint=str(first))


# 48 to 50: which checkpoint is gone on from


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def raise_the_rate(path: Path) -> None:
    state = torch.load(path, weights_only=False)
    state["base_lrs"] = [50 * rate for rate in state["base_lrs"]]
    torch.save(state, path)


FAULTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "optimizer deleted": ("optimizer.pt", Path.unlink),
    "one bit of the weights": (TRAINABLE_FILE, flip_a_bit),
    "learning rate × 50": ("scheduler.pt", raise_the_rate),
    "half of the trainer's state": ("trainer_state.json", lambda path: path.write_text(path.read_text()[:100])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_was_altered(
    whole: LmTrainer, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = copy_of(whole, tmp_path)
    name, spoil = FAULTS[fault]
    newest = checkpoints / "checkpoint-12"
    spoil(newest / name)
    with named(48):
        checkpoint.verify(newest, whole.run.run_id)
    with caplog.at_level(logging.WARNING, logger="chatalign"):
        assert checkpoint.latest_valid(checkpoints, whole.run.run_id) == checkpoints / "checkpoint-10"
    assert f"{newest / name}" in caplog.text
    assert caplog.text.rstrip().endswith("(checkpoint-10)")


def test_another_runs_checkpoint(whole: LmTrainer, tmp_path: Path) -> None:
    checkpoints = copy_of(whole, tmp_path)
    manifest = checkpoints / "checkpoint-12" / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace(whole.run.run_id, "another"), "utf-8")
    with named(49):
        checkpoint.latest_valid(checkpoints, whole.run.run_id)
    with pytest.raises(OtherRunError) as raised:
        checkpoint.verify(checkpoints / "checkpoint-12", whole.run.run_id)
    says(49, raised.value)


def test_the_newest_cut_off_while_it_was_saved(
    whole: LmTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = copy_of(whole, tmp_path)
    newest = checkpoints / "checkpoint-12"
    (newest / checkpoint.MANIFEST).unlink()
    (newest / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError) as raised:
        checkpoint.verify(newest, whole.run.run_id)
    says(50, raised.value)
    with caplog.at_level(logging.WARNING, logger="chatalign"):
        found = checkpoint.latest_valid(checkpoints, whole.run.run_id)
    assert str(raised.value) in caplog.text
    assert found is not None
    assert found.name == "checkpoint-10"
    resumed = trainer_in(tmp_path)
    resumed.train(resume_from_checkpoint=str(found))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert checkpoint.latest_valid(checkpoints, whole.run.run_id) == newest, "saved again, whole"
