"""Checkpoints that can be trusted and runs that can be stopped, for our trainers and TRL's alike.

A mixin above ``transformers.Trainer``: it writes each checkpoint aside and seals it with a manifest, keeps trainable
weights alone in it, turns signals and a spent time budget into a checkpoint and a message, and stops on a loss that
is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from chatalign import checkpoint
from chatalign.engine.disk import checkpoint_bytes, room_for
from chatalign.engine.guard import StepGuard
from chatalign.engine.metrics import Stopwatch
from chatalign.engine.other_inputs import refuse_other_form, saved_otherwise, settings_of, take_hold
from chatalign.engine.signals import in_own_group, note_saved
from chatalign.engine.stopping import EvaluationCut, StopWhenAsked
from chatalign.engine.weights import load_trainable, save_trainable
from chatalign.errors import NonFiniteError
from chatalign.models.resolve import base_sha256
from chatalign.recipe import StageRecipe
from chatalign.runs import Run


class SealedTrainer(Trainer):
    """`recipe` and `run` are set by a subclass, in its constructor or as class attributes, before it trains."""

    recipe: StageRecipe
    run: Run
    model: nn.Module
    saved_use_cache: bool | None = None  # the configuration's value, which Trainer turns off for training
    stopping: bool = False  # all processes know that they stop at this step
    _saving: bool = False  # a checkpoint is written, aside
    _saved_step: int | None = None  # of the newest checkpoint, as every process knows it without a look at the disk
    _saved_otherwise: bool = False  # the checkpoint that the run goes on from, before a change that was allowed

    def stage_state(self) -> dict[str, Any]:
        """JSON-able state of the stage that a resume must find again."""
        return {}

    def load_stage_state(self, state: Mapping[str, Any]) -> None:
        """Take `stage_state` back."""

    def count_tokens(self) -> int:
        """Tokens that the run has trained on, over processes and resumes; every process must call it."""
        return int(self.state.num_input_tokens_seen)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of this process group's training time, as of the last count."""
        seen = int(self.state.num_input_tokens_seen) - self._tokens_before
        return seen / max(self.stopwatch.seconds, 1e-9)

    def train(  # type: ignore[override]  # without hyperparameter search
        self, resume_from_checkpoint: str | None = None
    ) -> TrainOutput:
        """Train to the end, or raise Interrupted after a signal or ``max_hours``, with a checkpoint saved."""
        self._tokens_before = 0  # seen by the run before this process started
        self.stopwatch, self.stop = Stopwatch(), StopWhenAsked(self)
        if resume_from_checkpoint is not None:
            manifest = checkpoint.read_manifest(resume_from_checkpoint)
            extra, processes = manifest["extra"], self.args.world_size
            self._saved_otherwise = saved_otherwise(resume_from_checkpoint, manifest, self.run, processes)
            self._tokens_before = int(extra["tokens"])
            # Of the run's start, not of each process's: one that goes on evaluates first only what was cut short.
            self.args.eval_on_start = bool(extra.get("evaluation_owed")) and self.eval_dataset is not None
            self.load_stage_state(extra["stage"])
        elif self.args.should_save:
            self.run.take_allowed(self.recipe, step=0)
        self.add_callback(self.stop)
        self.add_callback(StepGuard(self))
        self.stopwatch.start()
        with self.stop.request:
            output = super().train(resume_from_checkpoint)
            self._stop_late()
            if self.stopping:
                note_saved()
        self.stopwatch.stop()
        if self.stopping:
            raise self.stop.error
        return output

    def _stop_late(self) -> None:
        """Stop after a signal that came once the last step was done: while it was evaluated or saved."""
        if not self.stopping and self.stop.asked():
            self.stopping = True
            if self._saved_step != self.state.global_step:
                self._save_checkpoint(self.model, None)

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if self.args.world_size == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Refuse a training loss or gradient norm that is not finite, then log."""
        for name, shown in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if name in logs and not math.isfinite(logs[name]) and not (name == "grad_norm" and self.args.fp16):
                self.refuse_non_finite(self.state.global_step, shown)
        super().log(logs, start_time)

    def refuse_non_finite(self, step: int, name: str) -> None:
        """Raise NonFiniteError for a step."""
        raise NonFiniteError(
            f"step {step}: the {name} is not finite; lower `train.learning_rate` (now {self.args.learning_rate:g}), "
            f"warm up longer, or use `train.bf16` in place of fp16; checkpoints before it are intact"
        )

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # its arguments differ between versions
        # After a checkpoint of the last step inside an epoch, or a stop in the evaluation at the start: transformers
        # would train one step more before it looks.
        if self.stopping or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _get_dataloader(self, **kwargs: Any) -> Any:  # type: ignore[override]  # TRL's loaders are made here
        loader = super()._get_dataloader(**kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's, around which it puts its own
        inner.worker_init_fn = partial(in_own_group, inner.worker_init_fn)
        return loader

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationCut:
            return {}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.stopwatch.paused():
            tokens = self.count_tokens()
            if self.args.should_save:
                checkpoint.begin(self.run.checkpoints)
            self.accelerator.wait_for_everyone()
            needed = checkpoint_bytes(self.model, self.optimizer)
            with room_for(self.run.checkpoints / checkpoint.SAVING, needed, "a checkpoint"):
                self._saving = True
                super()._save_checkpoint(model, trial)
                self._saving = False
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._publish(tokens)
            self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step

    def _publish(self, tokens: int) -> None:
        saved = self.run.checkpoints / checkpoint.SAVING / f"checkpoint-{self.state.global_step}"
        extra = {"tokens": tokens, "stage": self.stage_state(), "evaluation_owed": self.stop.evaluation_owed}
        made_from = self.run.made_from(self.recipe) | {"world_size": self.args.world_size}
        if (base := made_from["base_model"]) and base["sha256"] is None:  # the Hub's cache names files by their hash
            base["sha256"] = base_sha256(base["name_or_path"], base["revision"] or "main")
        checkpoint.publish(saved, self.run.run_id, extra, made_from)
        if (keep := self.recipe.train.save_total_limit) is not None:
            checkpoint.prune(self.run.checkpoints, keep=keep, run_id=self.run.run_id)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / checkpoint.SAVING) if self._saving else folder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:  # gathered from shards
            super()._save(output_dir, state_dict)
        else:
            save_trainable(self.model, Path(output_dir or self.run.checkpoints), write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            refuse_other_form(self, checkpoint)
        settings = settings_of(self) if self._saved_otherwise else []
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._saved_otherwise:
            take_hold(self, settings, str(checkpoint))
        if checkpoint is not None:
            self._saved_step = self.state.global_step
            if self.args.should_save:
                self.run.take_allowed(self.recipe, step=self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if model is not None:  # sharded, and wrapped already
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trainable(self.model, Path(resume_from_checkpoint))
