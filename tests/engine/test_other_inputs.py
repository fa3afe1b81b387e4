"""A run that goes on under a change that was allowed trains as the change says, and as nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatalign.checkpoint import read_manifest
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.other_inputs import saved_otherwise
from chatalign.engine.stage import train
from chatalign.errors import CheckpointError, OtherRunError
from chatalign.runs import Run

from .stand_ins import lm_rows, make_trainer, weights

ROWS = 16  # 8 steps of two


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LmTrainer]:
    """A run's folder with checkpoints of steps 2 and 3, and the run, which went on to step 4."""
    folder = tmp_path_factory.mktemp("begun")
    trainer = make_trainer(folder, lm_rows(ROWS), max_steps=4, save_steps=1, save_total_limit=4)
    train(trainer, trainer.run)
    return folder, trainer


def go_on(begun: Path, folder: Path, *, step: int = 2, allowed: bool = True, **settings: Any) -> LmTrainer:
    """The trainer that goes on from a checkpoint of `begun`, whose fingerprint was ``f``, under other settings."""
    place = folder / "checkpoints" / f"checkpoint-{step}"
    shutil.copytree(begun / "checkpoints" / place.name, place)
    trainer = make_trainer(folder, lm_rows(ROWS), **({"max_steps": 4} | settings))
    if allowed:
        trainer.run = Run(folder=folder, run_id="run1", fingerprint="g", parents=[], earlier=frozenset({"f"}))
    return trainer


def rates(trainer: LmTrainer) -> dict[int, float]:
    return {line["step"]: line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line}


def test_a_new_rate_is_the_rate_of_the_next_step(begun: tuple[Path, LmTrainer], tmp_path: Path) -> None:
    """AdamW without decay moves each weight in proportion to the rate, from the same state and gradient."""
    folder, _ = begun
    one = go_on(folder, tmp_path / "one", max_steps=3)
    fifty = go_on(folder, tmp_path / "fifty", max_steps=3, learning_rate=50e-3)
    ignored = go_on(folder, tmp_path / "ignored", max_steps=3, learning_rate=50e-3, allowed=False)
    for trainer in (one, fifty, ignored):
        train(trainer, trainer.run)
    assert (rates(one)[3], rates(fifty)[3]) == (1e-3, 50e-3)
    assert rates(ignored)[3] == 1e-3  # what transformers does by itself: the checkpoint's
    start = go_on(folder, tmp_path / "start", max_steps=2)
    train(start, start.run)
    before = weights(start)
    for name, moved in weights(one).items():
        torch.testing.assert_close(
            weights(fifty)[name] - before[name], 50 * (moved - before[name]), rtol=1e-3, atol=1e-5
        )
        assert torch.equal(moved, weights(ignored)[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3, "max_steps": 8},
        {"lr_scheduler_type": "linear", "max_steps": 6},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}, "max_steps": 5},
        {"lr_scheduler_type": "polynomial", "learning_rate": 2e-3, "max_steps": 5},
    ],
    ids=lambda settings: settings["lr_scheduler_type"],
)
def test_a_new_schedule_is_that_of_a_run_that_had_it_from_the_start(
    settings: dict[str, Any], begun: tuple[Path, LmTrainer], tmp_path: Path
) -> None:
    whole = make_trainer(tmp_path / "whole", lm_rows(ROWS), **settings)
    whole.train()
    changed = go_on(begun[0], tmp_path / "changed", **settings)
    train(changed, changed.run)
    assert changed.state.global_step == settings["max_steps"]
    later = {step: rate for step, rate in rates(whole).items() if step > 2}
    assert len(later) == settings["max_steps"] - 2
    assert {step: rate for step, rate in rates(changed).items() if step > 2} == pytest.approx(later)


def test_the_optimizers_settings_and_the_intervals_are_the_new_ones(
    begun: tuple[Path, LmTrainer], tmp_path: Path
) -> None:
    new = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    changed = go_on(begun[0], tmp_path, **new, logging_steps=2, save_steps=2)
    train(changed, changed.run)
    assert changed.optimizer is not None
    decayed, kept = changed.optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all((group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6) for group in (decayed, kept))
    assert sorted(rates(changed)) == [1, 2, 4]  # before the change every step
    assert sorted(path.name for path in changed.run.checkpoints.glob("c*")) == ["checkpoint-2", "checkpoint-4"]


def test_from_its_own_checkpoints_a_changed_run_goes_on_bit_by_bit(
    begun: tuple[Path, LmTrainer], tmp_path: Path
) -> None:
    new = {"learning_rate": 5e-3, "lr_scheduler_type": "cosine", "max_steps": 6, "save_steps": 1}
    whole = go_on(begun[0], tmp_path / "whole", **new, save_total_limit=5)
    train(whole, whole.run)
    folder = tmp_path / "again"
    place = folder / "checkpoints" / "checkpoint-4"
    shutil.copytree(whole.run.checkpoints / place.name, place)
    again = make_trainer(folder, lm_rows(ROWS), **new)
    again.run = Run(folder=folder, run_id="run1", fingerprint="g", parents=[], earlier=frozenset({"f"}))
    train(again, again.run)
    for name, values in weights(whole).items():
        assert torch.equal(weights(again)[name], values), name


def test_a_run_can_not_end_before_its_checkpoint(begun: tuple[Path, LmTrainer], tmp_path: Path) -> None:
    changed = go_on(begun[0], tmp_path, step=3, max_steps=2)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: is past the 2 steps that the run has now; ask for more"):
        train(changed, changed.run)


def test_a_checkpoint_of_inputs_that_the_run_never_had_is_refused(
    begun: tuple[Path, LmTrainer], tmp_path: Path
) -> None:
    other = go_on(begun[0], tmp_path, allowed=False)
    other.run = Run(folder=tmp_path, run_id="run1", fingerprint="g", parents=[])
    with pytest.raises(OtherRunError, match=r"was saved under other inputs \(fingerprint f\) than run run1 ever had"):
        train(other, other.run)


def test_the_manifest_says_what_the_run_was_made_from(begun: tuple[Path, LmTrainer]) -> None:
    folder, trainer = begun
    manifest = json.loads((folder / "checkpoints" / "checkpoint-2" / "manifest.json").read_text("utf-8"))
    assert {name: manifest[name] for name in ("run_id", "fingerprint", "world_size", "parents")} == {
        "run_id": "run1",
        "fingerprint": "f",
        "world_size": 1,
        "parents": [],
    }
    assert manifest["recipe"] == trainer.recipe.model_dump(mode="json")
    assert manifest["versions"]["torch"] == importlib.metadata.version("torch")


def test_precision_is_the_new_one(begun: tuple[Path, LmTrainer], tmp_path: Path) -> None:
    changed = go_on(begun[0], tmp_path, bf16=True)
    train(changed, changed.run)
    assert changed.accelerator.mixed_precision == "bf16"
    _, whole = begun
    assert any(not torch.equal(weights(whole)[name], values) for name, values in weights(changed).items())


def test_without_a_change_it_ends_as_if_never_stopped(begun: tuple[Path, LmTrainer], tmp_path: Path) -> None:
    plain = go_on(begun[0], tmp_path, allowed=False)
    train(plain, plain.run)
    _, whole = begun
    assert all(torch.equal(weights(whole)[name], values) for name, values in weights(plain).items())


def test_a_step_of_the_same_rows_goes_on_however_it_is_cut(begun: tuple[Path, LmTrainer], tmp_path: Path) -> None:
    """Two rows at once, then one after the other: what two processes are to one that accumulates."""
    changed = go_on(begun[0], tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    train(changed, changed.run)
    _, whole = begun
    for name, values in weights(whole).items():
        torch.testing.assert_close(weights(changed)[name], values, atol=1e-6, rtol=1e-5)


def test_another_number_of_processes_is_refused_but_where_it_is_allowed(
    begun: tuple[Path, LmTrainer], tmp_path: Path
) -> None:
    changed = go_on(begun[0], tmp_path)
    path = tmp_path / "checkpoints" / "checkpoint-2" / "manifest.json"
    sealed = json.loads(path.read_text("utf-8")) | {"world_size": 2}
    del sealed["sha256"]  # the manifest's own
    path.write_text(json.dumps(sealed), "utf-8")
    with pytest.raises(CheckpointError, match=r"was saved by 2 processes, and 1 would go on; .* `--allow-change proc"):
        train(changed, changed.run)
    run = replace(changed.run, allowed_processes=1)
    assert saved_otherwise("x", read_manifest(path.parent), run, 1)


def test_an_older_checkpoint_is_held_to_what_it_says(begun: tuple[Path, LmTrainer], tmp_path: Path) -> None:
    changed = go_on(begun[0], tmp_path)
    path = tmp_path / "checkpoints" / "checkpoint-2" / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    new = {
        name: manifest.pop(name) for name in ("fingerprint", "world_size", "recipe", "data", "base_model", "parents")
    }
    manifest["extra"] |= {name: new[name] for name in ("fingerprint", "world_size")}
    path.write_text(json.dumps(manifest), "utf-8")
    read = read_manifest(path.parent)
    assert (read["fingerprint"], read["world_size"]) == ("f", 1)
    assert saved_otherwise("x", read, changed.run, 1)
    for name in ("fingerprint", "world_size"):
        del manifest["extra"][name]
    path.write_text(json.dumps(manifest), "utf-8")
    read = read_manifest(path.parent)
    assert saved_otherwise("x", read, changed.run, 3)  # a run that was changed: its settings are put back
    assert not saved_otherwise("x", read, replace(changed.run, earlier=frozenset()), 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [("optimizer_0", "FSDP's, and this launch's would be whole"), ("global_step2", "DeepSpeed's"), (None, "missing")],
)
def test_optimizer_states_of_another_form_are_refused(
    name: str | None, words: str, begun: tuple[Path, LmTrainer], tmp_path: Path
) -> None:
    """transformers raises for the first, and begins without a state for the others."""
    plain = go_on(begun[0], tmp_path, allowed=False)
    place = tmp_path / "checkpoints" / "checkpoint-2"
    (place / "optimizer.pt").unlink()
    if name is not None:
        (place / name).mkdir()
    with pytest.raises(CheckpointError, match=f"checkpoint-2: its optimizer states are {words}"):
        plain.train(str(place))
