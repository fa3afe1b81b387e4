"""When a run stops before its end: after a signal or ``max_hours``, every process at the same step, and saved."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from chatalign.engine.signals import StopRequest
from chatalign.errors import Interrupted, StageStopped
from chatalign.runs import is_main_process

if TYPE_CHECKING:
    from chatalign.engine.sealed import SealedTrainer

# What processes tell each other, the largest being what counts; a signal is its number and this.
_GO_ON, _OUT_OF_TIME, _SIGNAL = 0, 1, 2


class EvaluationCut(Exception):
    """Leaves an evaluation loop in its middle: the run stops."""


class StopWhenAsked(TrainerCallback):
    """Saves and stops at the end of the step in which a signal came to any process, or the time was spent.

    Processes agree at every step, and at every batch of an evaluation, which is then cut short; a run that goes on
    makes it up first. They compare a number over gloo, on the CPU: no device is waited for.
    """

    def __init__(self, trainer: SealedTrainer) -> None:
        self.trainer = trainer
        self.request = StopRequest(_notice)
        self.began = time.perf_counter()
        self.agreed = _GO_ON  # why to stop, as all processes know it
        self.evaluation_owed = False  # was due at the step at which the run stopped
        self._group: Any = None
        if trainer.args.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def asked(self) -> bool:
        """Whether any process is to stop; every process must ask."""
        self.agreed = self._own()
        if self.trainer.args.world_size > 1:
            # 0.2 to 0.3 ms, two processes on two busy cores.
            most = torch.tensor(self.agreed)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
            self.agreed = int(most)
        return self.agreed != _GO_ON

    def _own(self) -> int:
        if self.request.received is not None:
            return _SIGNAL + self.request.received
        budget, state = self.trainer.recipe.train.max_hours, self.trainer.state
        spent = budget is not None and time.perf_counter() - self.began > 3600 * budget
        # PPO may end before `max_steps`, where `target_kl` cut some.
        ended = state.global_step >= state.max_steps or self.trainer.control.should_training_stop
        return _OUT_OF_TIME if spent and not ended else _GO_ON

    @property
    def error(self) -> Interrupted:
        """What a run that was stopped ends with."""
        state, run = self.trainer.state, self.trainer.run
        saved = (
            f"saved at step {state.global_step} of {state.max_steps} in {run.checkpoints}; "
            "the same command goes on from there"
        )
        if not state.global_step:  # in the evaluation at the start
            saved = "stopped before the first step; the same command begins again"
        if self.agreed >= _SIGNAL:
            return Interrupted(f"{signal.Signals(self.agreed - _SIGNAL).name}: {saved}")
        return StageStopped(f"`train.max_hours: {self.trainer.recipe.train.max_hours:g}` are over: {saved}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Runs after transformers' own flow callback, which decides whether this step is evaluated."""
        if not (self.trainer.stopping or self.asked()):
            return
        self._stop(control)
        if not _scheduled_by_evaluation(args):
            self.evaluation_owed = control.should_evaluate or _epoch_evaluated(args, state)
            control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After each batch of an evaluation; raises EvaluationCut where training stops."""
        if self.trainer.is_in_train and not _scheduled_by_evaluation(args) and self.asked():
            self._stop(control)
            self.evaluation_owed = True
            raise EvaluationCut

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a whole evaluation: PPO's, whose replies are drawn at one go, is never cut short."""
        if self.trainer.is_in_train and not self.trainer.stopping and self.asked():
            self._stop(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Comes after the last step in any case: what it brings is not due where the epoch was left early."""
        if self.trainer.stopping:
            again = _scheduled_by_evaluation(args) and _epoch_evaluated(args, state)
            control.should_evaluate = control.should_save = again

    def _stop(self, control: TrainerControl) -> None:
        self.trainer.stopping = control.should_save = control.should_training_stop = True


def _scheduled_by_evaluation(args: TrainingArguments) -> bool:
    """Whether what an evaluation finds sets the learning rate: it is then never left out or cut short."""
    return args.metric_for_best_model is not None


def _epoch_evaluated(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether this step is an epoch's last, and epochs are evaluated."""
    return args.eval_strategy == IntervalStrategy.EPOCH and state.epoch is not None and state.epoch == int(state.epoch)


def _notice(received: signal.Signals) -> None:
    """Tell the person at the terminal; written past Python's buffers, which a signal may have caught half-way."""
    if is_main_process():
        line = f"chatalign: {received.name}: saves at the end of this step and ends; once more ends at once\n"
        os.write(2, line.encode())
