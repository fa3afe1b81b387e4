"""The trainer base: 8 × 1 = 1 × 8, packing changes nothing but speed, a stopped run goes on bit by bit the same."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from chatalign import checkpoint
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.stage import train
from chatalign.engine.stopping import StopWhenAsked
from chatalign.errors import Interrupted, NonFiniteError
from chatalign.tracking import METRICS_FILE, read_metrics

from .stand_ins import lm_rows, make_run, make_trainer, weights


def logged(trainer: LmTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_eight_micro_batches_are_one_batch_of_eight(tmp_path: Path) -> None:
    rows = lm_rows(20)
    one = make_trainer(tmp_path / "a", rows, per_device_train_batch_size=8)
    eight = make_trainer(tmp_path / "b", rows, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    for trainer in (one, eight):
        trainer.train()
    assert one.state.global_step == eight.state.global_step == 3  # the last step has four rows
    for name, values in weights(one).items():
        torch.testing.assert_close(weights(eight)[name], values, atol=1e-5, rtol=1e-5)
    assert logged(eight, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert logged(eight, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-4)


def test_packed_rows_train_as_unpacked_ones(tmp_path: Path) -> None:
    rows = lm_rows(12)
    packed = make_trainer(tmp_path / "a", rows, packing=True, per_device_train_batch_size=100)
    plain = make_trainer(tmp_path / "b", rows, per_device_train_batch_size=100)
    assert len(packed.train_dataset) < len(plain.train_dataset) == 12
    for trainer in (packed, plain):
        trainer.train()
    for name, values in weights(plain).items():
        torch.testing.assert_close(weights(packed)[name], values, atol=1e-5, rtol=1e-4)


def test_loss_is_the_mean_over_supervised_tokens(tmp_path: Path) -> None:
    rows = lm_rows(6)
    trainer = make_trainer(tmp_path, rows, per_device_train_batch_size=6, learning_rate=1e-9)
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logps = trainer.model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        picked = logps.gather(1, ids[0, 1:, None]).squeeze(1)
        losses.append(-picked[torch.tensor(row["supervised"][1:]).bool()])
    trainer.train()
    expected = float(torch.cat(losses).mean())
    assert logged(trainer, "loss") == pytest.approx([expected], rel=1e-5)
    assert logged(trainer, "perplexity") == pytest.approx([math.exp(expected)], rel=1e-5)


def test_evaluation_counts_every_token_once(tmp_path: Path) -> None:
    rows = lm_rows(7, seed=1)
    by_one = make_trainer(tmp_path / "a", lm_rows(2), eval_rows=rows, per_device_eval_batch_size=1)
    by_five = make_trainer(tmp_path / "b", lm_rows(2), eval_rows=rows, per_device_eval_batch_size=5)
    packed = make_trainer(tmp_path / "c", lm_rows(2), eval_rows=rows, packing=True)
    losses = [trainer.evaluate()["eval_loss"] for trainer in (by_one, by_five, packed)]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


def test_each_epoch_has_another_order_of_the_same_rows(tmp_path: Path) -> None:
    loader = make_trainer(tmp_path, lm_rows(9)).get_train_dataloader()
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append([index for batch in loader.batch_sampler for index in batch])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(9))


class _DropsOut(LmTrainer):
    """Uses the random state in each step, so that a resume must restore it."""

    def objective(self, model: Any, batch: Any, num_items: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().objective(model, batch, num_items)
        return loss * (0.5 + torch.rand(())), metrics


class _Signalled(_DropsOut):
    """Gets a signal from outside during step 5, or finds then that its time is over."""

    cause = "SIGTERM"

    def objective(self, model: Any, batch: Any, num_items: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self.state.global_step == 4 and self.cause == "max_hours":
            self.stop.began -= 3601.0
        elif self.state.global_step == 4:
            os.kill(os.getpid(), signal.Signals[self.cause])
        return super().objective(model, batch, num_items)


_RESUMED = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "save_steps": 2, "lr_scheduler_type": "cosine"}


@pytest.mark.parametrize("cause", ["SIGTERM", "SIGINT", "SIGUSR1", "max_hours"])
def test_a_stopped_run_goes_on_bit_by_bit_the_same(cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lm_rows(7)  # 4 steps an epoch, the last one short; 12 in all
    whole = make_trainer(tmp_path / "whole", rows, trainer_class=_DropsOut, **_RESUMED)
    train(whole, whole.run)
    monkeypatch.setattr(_Signalled, "cause", cause)
    stopped = make_trainer(tmp_path / "run", rows, trainer_class=_Signalled, **_RESUMED, max_hours=1.0)
    with pytest.raises(Interrupted, match=rf"{cause}.*: saved at step 5 of 12 .* goes on from there"):
        train(stopped, stopped.run)
    assert checkpoint.latest_valid(stopped.run.checkpoints, "run1").name == "checkpoint-5"
    resumed = make_trainer(tmp_path / "run", rows, trainer_class=_DropsOut, **_RESUMED)
    train(resumed, resumed.run)
    assert resumed.state.global_step == whole.state.global_step == 12
    for name, values in weights(whole).items():
        assert torch.equal(weights(resumed)[name], values), name
    assert (
        resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen == 3 * sum(map(len, rows["input_ids"]))
    )
    lines = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "run" / METRICS_FILE) if "loss" in line}
    whole_lines = {
        line["step"]: line["loss"] for line in read_metrics(tmp_path / "whole" / METRICS_FILE) if "loss" in line
    }
    assert lines == whole_lines


_EVALUATED = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2}


def evaluated_trainer(folder: Path, **more: Any) -> LmTrainer:
    return make_trainer(folder, lm_rows(16), eval_rows=lm_rows(6, seed=1), **(_EVALUATED | more))


def stopped_in_evaluation(trainer: LmTrainer, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a run says that gets a signal in the first evaluation that it makes."""
    with monkeypatch.context() as patch:
        patch.setattr(StopWhenAsked, "on_prediction_step", _with_signal(StopWhenAsked.on_prediction_step))
        with pytest.raises(Interrupted) as stopped:
            train(trainer, trainer.run)
    return str(stopped.value)


def _with_signal(right: Any) -> Any:
    def signalled(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return right(*arguments, **named)

    return signalled


def killed_after(step: int, trainer: LmTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trainer.training_step

    def dies(*arguments: Any, **named: Any) -> Any:
        if trainer.state.global_step == step:
            raise MemoryError
        return right(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", dies)
        with pytest.raises(MemoryError):
            train(trainer, trainer.run)


def losses(folder: Path) -> list[tuple[int, str, float]]:
    names = ("loss", "eval_loss")
    return [(line["step"], x, line[x]) for line in read_metrics(folder / METRICS_FILE) for x in names if x in line]


def test_an_evaluation_that_was_cut_short_is_made_once_however_often_it_is_cut_or_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated_trainer(tmp_path / "whole")
    train(whole, whole.run)
    for _ in range(2):
        assert "saved at step 2 of 4" in stopped_in_evaluation(evaluated_trainer(tmp_path / "run"), monkeypatch)
    killed_after(2, evaluated_trainer(tmp_path / "run"), monkeypatch)
    assert [line[:2] for line in losses(tmp_path / "run")] == [(1, "loss"), (2, "loss"), (2, "eval_loss")]
    resumed = evaluated_trainer(tmp_path / "run")
    train(resumed, resumed.run)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_evaluation_that_is_owed_is_left_out_where_no_rows_are_left_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_in_evaluation(evaluated_trainer(tmp_path), monkeypatch)
    resumed = make_trainer(tmp_path, lm_rows(16), max_steps=4)
    train(resumed, resumed.run)
    assert resumed.state.global_step == 4


def test_the_evaluation_at_the_start_is_that_of_the_run_not_of_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"eval_on_start": True, "save_strategy": "steps", "save_steps": 3}
    whole = evaluated_trainer(tmp_path / "whole", **first)
    train(whole, whole.run)
    said = stopped_in_evaluation(evaluated_trainer(tmp_path / "run", **first), monkeypatch)
    assert said == "SIGTERM: stopped before the first step; the same command begins again"
    killed_after(3, evaluated_trainer(tmp_path / "run", **first), monkeypatch)
    resumed = evaluated_trainer(tmp_path / "run", **first)
    train(resumed, resumed.run)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [step for step, name, _ in losses(tmp_path / "run") if name == "eval_loss"] == [0, 2, 4]


class _EndsEarly(TrainerCallback):
    """As PPO, whose last rollout may have fewer optimizer steps than were counted on; the time is over then too."""

    def __init__(self, trainer: LmTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 2:
            control.should_training_stop = True
            self.trainer.stop.began -= 3601.0


def test_time_that_is_over_after_the_last_step_stops_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lm_rows(16), max_steps=4, save_strategy="no", max_hours=1.0)
    trainer.add_callback(_EndsEarly(trainer))
    train(trainer, trainer.run)
    assert trainer.state.global_step == 2
    assert checkpoint.list_checkpoints(trainer.run.checkpoints) == []


def test_a_finished_run_does_not_train_again_from_its_last_checkpoint(tmp_path: Path) -> None:
    rows = lm_rows(9)
    first = make_trainer(tmp_path, rows, max_steps=7, save_steps=7)  # ends inside the second epoch
    train(first, first.run)
    again = make_trainer(tmp_path, rows, max_steps=7, save_steps=7)
    train(again, again.run)
    assert again.state.global_step == 7
    for name, values in weights(first).items():
        assert torch.equal(weights(again)[name], values), name


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    rows = lm_rows(8)
    first = make_trainer(tmp_path, rows, save_steps=2)
    train(first, first.run)
    newest = checkpoint.latest_valid(first.run.checkpoints, "run1")
    assert newest.name == "checkpoint-4"
    (newest / "optimizer.pt").unlink()
    assert checkpoint.latest_valid(first.run.checkpoints, "run1").name == "checkpoint-2"


def test_checkpoints_hold_no_pickled_settings_and_old_ones_go(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lm_rows(8), save_steps=1, save_total_limit=2)
    train(trainer, trainer.run)
    names = sorted(path.name for path in trainer.run.checkpoints.iterdir())
    assert names == ["LATEST", "checkpoint-3", "checkpoint-4"]
    assert not list(trainer.run.checkpoints.rglob("training_args.bin"))
    manifest = json.loads((trainer.run.checkpoints / "checkpoint-4" / "manifest.json").read_text())
    assert manifest["extra"]["tokens"] == trainer.state.num_input_tokens_seen


class _Explodes(LmTrainer):
    def objective(self, model: Any, batch: Any, num_items: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().objective(model, batch, num_items)
        return (loss * math.nan if self.state.global_step == 2 else loss), metrics


def test_a_loss_that_is_not_finite_names_its_step_and_leaves_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lm_rows(8), trainer_class=_Explodes, save_steps=1)
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is not finite; lower `train.learning_rate`"):
        train(trainer, trainer.run)
    assert all(bool(values.isfinite().all()) for values in weights(trainer).values())
    assert checkpoint.latest_valid(trainer.run.checkpoints, "run1").name == "checkpoint-2"


class _BadGradient(LmTrainer):
    def objective(self, model: Any, batch: Any, num_items: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().objective(model, batch, num_items)
        root = (loss - loss).abs().sqrt()  # 0, with an infinite slope
        return (loss + root if self.state.global_step == 1 else loss), metrics


def test_a_gradient_that_is_not_finite_is_found_before_the_weights_move(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lm_rows(8), trainer_class=_BadGradient)
    with pytest.raises(NonFiniteError, match="step 2: the gradient norm"):
        trainer.train()
    assert all(bool(values.isfinite().all()) for values in weights(trainer).values())


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, lm_rows(4), save_steps=1)
    train(first, first.run)
    with pytest.raises(Exception, match="belongs to run run1"):
        train(first, make_run(tmp_path, run_id="run2"))
