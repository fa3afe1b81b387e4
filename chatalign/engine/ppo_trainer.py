"""PPO as a StageTrainer: rollouts feed the trainer's batches, an optimizer step is a minibatch, each one counted.

The order of things is docs/ppo.md's: prompts → replies → scores → advantages → epochs × minibatches of clipped
updates. The trainer pulls micro-batches from `batches`, which draws a new rollout whenever the last one is used up,
always after the optimizer step before it, so that replies come from the weights that they are credited to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatalign.data.collate import collate_lm, collate_sequences
from chatalign.engine.batching import Batch, to_device
from chatalign.engine.guard import refuse_shared_seeds
from chatalign.engine.metrics import MetricSums
from chatalign.engine.model_setup import set_up_reference
from chatalign.engine.ppo_collect import Play, speeds
from chatalign.engine.ppo_experience import KL_ESTIMATORS, Episodes, Experience, evaluation_metrics, make_experience
from chatalign.engine.ppo_guard import RatioGuard, refuse_other_gradient, refuse_other_sampling, refuse_values
from chatalign.engine.ppo_model import PpoModel, PpoOutput, allow_all_tokens
from chatalign.engine.ppo_normalise import fit_on_replies
from chatalign.engine.ppo_schedule import Position
from chatalign.engine.ppo_shards import ShardedTrainer
from chatalign.engine.ppo_state import load_experience, save_experience
from chatalign.engine.ppo_update import clipped_policy_loss, clipped_value_loss, set_own_rate, update_metrics
from chatalign.engine.replay import other_rows
from chatalign.engine.trainer import Items, Metrics
from chatalign.errors import NonFiniteError
from chatalign.maths import AdaptiveKLController, FixedKLController
from chatalign.recipe import PpoRecipe, PpoSection
from chatalign.runs import Run

# Far from any training seed, so that evaluation draws are the same all through a run and no training draw's.
_EVALUATION_SEEDS = 2**40


class RolloutLoader:
    """What the trainer iterates over; without a length, since the replies do not exist yet."""

    def __init__(self, trainer: PpoTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Batch]:
        return self.trainer.batches()


class PpoTrainer(ShardedTrainer):
    """Schulman et al. (1707.06347) on rewards with a KL penalty a token (2203.02155), details as in 2403.17031."""

    items: ClassVar[Items] = "tokens"
    model: PpoModel

    def __init__(
        self,
        *,
        play: Play,
        recipe: PpoRecipe,
        run: Run,
        args: TrainingArguments,
        model: PpoModel,
        tokenizer: Any,
        train_rows: Any,
        eval_rows: Any | None,
    ) -> None:
        super().__init__(
            recipe=recipe,
            run=run,
            args=args,
            model=model,
            tokenizer=tokenizer,
            train_rows=train_rows,
            eval_rows=eval_rows,
            collate=collate_lm,
        )
        self.prepare_shards()
        reference = play.collector.reference.module
        if reference is not None:  # with the policy's own kernels: the KL of the first rollout is 0 in any precision
            with self.accelerator.autocast():
                set_up_reference(reference, recipe, self.levers)
        refuse_other_gradient(recipe.ppo.kl_estimator, KL_ESTIMATORS[recipe.ppo.kl_estimator])
        self.play = play
        play.collector.rewards.to(args.device)
        play.collector.autocast, play.collector.gathered = self.accelerator.autocast, self.gathered
        self.section: PpoSection = recipe.ppo
        self.prompt_rows: Any = train_rows
        self.eval_prompt_rows: Any = eval_rows
        self.kl_controller = _controller(recipe.ppo)
        self.position = Position()
        self.experience: Experience | None = None
        self.skipped = 0  # optimizer steps that `target_kl` cut
        self._step_kl = torch.zeros(2, dtype=torch.float64)
        self._update_started = 0.0
        self.add_callback(_AfterStep(self))
        self.ratios = RatioGuard(play.collector.limits, own_logps=play.collector.own_logps)
        self.add_callback(self.ratios)

    # Batches

    def get_train_dataloader(self) -> Any:
        """Micro-batches of replies, drawn as they are needed."""
        return RolloutLoader(self)

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this process, from the present position to the run's end."""
        schedule = self.play.schedule
        while self.position.rollout < schedule.rollouts:
            position = self.position
            if self.experience is None:
                self.experience = self._new_experience(position.rollout)
            rows = schedule.minibatch_rows(position)
            ptx = self._ptx_batches(position)
            for own_rows in schedule.own_micro_batches(rows):
                yield self._batch(self.experience, own_rows, fresh=position.epoch == position.minibatch == 0) | next(
                    ptx
                )
            if self.position == position:
                # Each minibatch is an optimizer step; the removed trainer's weren't (TRL #5645).
                raise RuntimeError(f"{position} was used up before its optimizer step")

    def _new_experience(self, rollout: int) -> Experience:
        schedule, sampling = self.play.schedule, self.play.sampling
        refuse_other_sampling(drawn=sampling.temperature or 1.0, trained=self.model.temperature)
        if rollout == 0 and self.section.normalize_reward == "replies":
            fit_on_replies(self.play, self.model, self.prompt_rows, gather_object)
        rows = [self.prompt_rows[row] for row in schedule.own(schedule.prompt_rows(rollout))]
        seeds = schedule.own(schedule.episodes(rollout))
        if self.args.world_size > 1:
            refuse_shared_seeds(gather_object([list(seeds)]), rollout)
        collected = self.play.collector.collect(rows, sampling, seeds, untrained=rollout == 0)
        parts = gather_object([collected]) if self.args.world_size > 1 else [collected]
        coef = self.kl_controller.coef
        episodes = Episodes.join([part.episodes for part in parts])
        experience = make_experience(episodes, self.section, kl_coef=coef)
        if rollout == 0 and self.model.value_from_zero:
            refuse_values(episodes.values, experience.returns)
        if not bool(experience.advantages.isfinite().all() and experience.returns.isfinite().all()):
            raise NonFiniteError(
                f"rollout {rollout}: an advantage is not finite; lower `train.learning_rate`, or look at the rewards"
            )
        self.kl_controller.update(experience.metrics["objective/kl"], len(experience))
        metrics = experience.metrics | speeds(parts) | {"episodes": float(schedule.episodes(rollout).stop)}
        # A number that doesn't exist (no variance to explain) is left out of the log.
        kept = {name: torch.tensor(value) for name, value in metrics.items() if math.isfinite(value)}
        self.metric_sums.add({name: value.to(self.args.device) for name, value in kept.items()})
        self._update_started = time.perf_counter()
        return experience

    def _batch(self, experience: Experience, rows: list[int], *, fresh: bool) -> Batch:
        chosen = experience.select(rows)
        batch: Batch = dict(collate_sequences(chosen.pop("prompt_ids"), chosen.pop("response_ids")))
        return batch | chosen | {"fresh": fresh}

    def _ptx_batches(self, position: Position) -> Iterator[Batch]:
        """For each micro-batch its pretraining rows, or nothing; ``ptx_items`` counts the whole step's targets."""
        schedule, rows = self.play.schedule, self.play.ptx_rows
        if rows is None:
            while True:
                yield {}
        chosen = schedule.ptx_rows(position, available=len(rows))
        items = sum(sum(rows[row]["supervised"][1:]) for row in chosen)
        for own_rows in schedule.own_micro_batches(chosen):
            yield {"ptx": collate_lm([rows[row] for row in own_rows]), "ptx_items": max(items, 1)}

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        nested = {"ptx": to_device(inputs["ptx"], self.args.device)} if "ptx" in inputs else {}
        return super()._prepare_inputs(inputs) | nested

    # A step

    def objective(  # type: ignore[override]
        self, model: nn.Module, batch: Batch, num_items: float | Tensor
    ) -> tuple[Tensor, Metrics]:
        """Clipped policy loss + vf_coef · clipped value loss − entropy_coef · entropy + ptx_coef · LM loss."""
        section, warming = self.section, self.position.rollout < self.section.value_warmup_rollouts
        self.model.detach_value = warming
        self.ratios.hold_still(lambda: self._policy_logps(model, batch))
        value = None
        if self._sides_apart:
            # The value function's activations are gone before the policy's come.
            value = clipped_value_loss(section, model(batch, part="value").values, batch, num_items)
            self.accelerator.backward(section.vf_coef * value.loss)
        out: PpoOutput = model(batch, batch.get("ptx"), part="policy" if self._sides_apart else "both")
        policy, policy_side = clipped_policy_loss(section, out, batch, num_items)
        if value is None:
            value = clipped_value_loss(section, out.values, batch, num_items)
        value_side = section.vf_coef * value.loss
        loss = (0.0 if warming else 1.0) * policy_side + (value_side.detach() if self._sides_apart else value_side)
        log_ratio = out.logps.detach() - batch["old_logps"]
        metrics = update_metrics(out, log_ratio, policy, value, num_items)
        if batch["fresh"]:  # before any update of this rollout: trainer against sampler, with no extra pass
            if not self.play.collector.own_logps:
                metrics["sampler/logprob_gap"] = log_ratio.abs()
            self.ratios.note(out.logps.detach(), batch["old_logps"])
        if section.target_kl is not None:
            count = len(log_ratio)
            self._step_kl += torch.tensor([float(policy.approxkl) * count, count], dtype=torch.float64)
        return loss, metrics

    @property
    def _sides_apart(self) -> bool:
        """Whether policy and value function, sharing no trained weight, have a backward pass each.

        That took a quarter less memory, measured. DDP, FSDP and DeepSpeed reduce gradients in one.
        """
        plain = self.args.world_size == 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        return plain and not self.model.shares_trunk

    def _policy_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        # With gradients only where layers are compiled for them. DDP would wait for a backward pass then.
        compiled = self.levers.compile and not self.is_fsdp_enabled
        with torch.set_grad_enabled(compiled):
            return (self.model if compiled else model)(batch, part="policy").logps.detach()

    def after_step(self) -> bool:
        """Move on to the next minibatch, or the next rollout where `target_kl` is passed; True at the run's end."""
        schedule, stop = self.play.schedule, False
        if self.section.target_kl is not None:
            total, count = self.reduce(self._step_kl.to(self.args.device, torch.float32)).tolist()
            stop = total / max(count, 1) > self.section.target_kl
            self._step_kl.zero_()
        before, self.position = self.position, schedule.after(self.position, skip_rollout=stop)
        if self.position.rollout > before.rollout:
            last = (before.epoch + 1) * schedule.minibatches - (schedule.minibatches - 1 - before.minibatch)
            cut = schedule.epochs * schedule.minibatches - last
            self.skipped += cut
            self._finish_rollout(cut)
        return self.position.rollout >= schedule.rollouts

    def _finish_rollout(self, cut: int) -> None:
        assert self.experience is not None
        tokens = len(self.experience.old_logps) * self.play.schedule.epochs
        done = 1 - cut / (self.play.schedule.epochs * self.play.schedule.minibatches)
        seconds = max(time.perf_counter() - self._update_started, 1e-9)
        observed = {
            "speed/update_tokens_per_s": tokens * done / seconds,
            "policy/epochs": done * self.section.num_ppo_epochs,
        }
        self.metric_sums.add({name: torch.tensor(x, device=self.args.device) for name, x in observed.items()})
        self.experience = None

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """The ratio's variance from its mean and mean square."""
        if (square := means.pop("policy/ratio_square", None)) is not None:
            means["policy/ratio_var"] = max(square - means["policy/ratio_mean"] ** 2, 0.0)
        return means

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As transformers', with ``value_learning_rate`` for the value function's own weights."""
        if self.optimizer is None and (rate := self.section.value_learning_rate) is not None:
            optimizer = super().create_optimizer(model)
            set_own_rate(optimizer, self.model.value_parameters(), rate)
            return optimizer
        return super().create_optimizer(model)

    # Evaluation

    def _evaluation_means(self, eval_dataset: Any) -> dict[str, float]:
        """Score, KL and length of fresh replies to the evaluation prompts, the same draws at each evaluation."""
        rows = self.eval_prompt_rows
        mine = list(range(len(rows)))[self.args.process_index :: self.args.world_size]
        filler = not mine
        chosen = mine or [0]
        seeds = [_EVALUATION_SEEDS + row for row in chosen]
        collected = self.play.collector.collect([rows[row] for row in chosen], self.play.sampling, seeds)
        sums = MetricSums()
        observed = evaluation_metrics(collected.episodes, self.section, kl_coef=self.kl_controller.coef)
        sums.add({name: value.to(self.args.device) for name, value in observed.items()}, filler=filler)
        return sums.drain(self.reduce)

    # Checkpoints

    def stage_state(self) -> dict[str, Any]:
        """Position, KL controller and counters; the rollout itself is in files of its own."""
        state = {"position": asdict(self.position), "kl": self.kl_controller.state_dict(), "skipped": self.skipped}
        return state | {"rewards": self.play.collector.rewards.state_dict()}

    def load_stage_state(self, state: Mapping[str, Any]) -> None:
        """Take `stage_state` back; raises CheckpointError where the rollout's prompts are not those of its position."""
        self.position = Position(**state["position"])
        rollout = self.position.rollout
        prompts = [self.prompt_rows[row]["prompt_ids"] for row in self.play.schedule.prompt_rows(rollout)]
        if self.experience and self.experience.prompt_ids != prompts:
            raise other_rows(str(self.run.checkpoints), f"rollout {rollout} answered other prompts")
        if isinstance(self.kl_controller, AdaptiveKLController):  # a fixed one is what the recipe says, now
            self.kl_controller.load_state_dict(state["kl"])
        self.skipped = int(state["skipped"])
        self.play.collector.rewards.load_state_dict(state["rewards"])

    def train(self, resume_from_checkpoint: Any = None) -> Any:  # type: ignore[override]
        """Train to the end; asserts that each minibatch that wasn't cut by ``target_kl`` was an optimizer step.

        Raises GuardError where the reference moved; not known where weights are sharded.
        """
        if resume_from_checkpoint is not None:
            self.experience = load_experience(Path(resume_from_checkpoint))
        reference = self.play.collector.reference
        sha256 = None if self.is_fsdp_enabled or self.is_deepspeed_enabled else reference.sha256()
        output = super().train(resume_from_checkpoint)
        if sha256 is not None:
            reference.refuse_moved(sha256)
        if self.state.global_step != self.play.schedule.steps - self.skipped:
            raise RuntimeError(
                f"{self.state.global_step} optimizer steps, not {self.play.schedule.steps} − {self.skipped} skipped"
            )
        return output

    def release_policy(self) -> None:
        """After training: leave the policy alone as the model, as it was loaded, ready to be saved."""
        allow_all_tokens(self.model.policy)
        self.model = self.model.policy
        if self.is_fsdp_enabled:
            self.model_wrapped = self.model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.experience is not None and self.args.should_save:
            save_experience(self.experience, Path(output_dir or str(self.args.output_dir)))


class _AfterStep(TrainerCallback):
    """Moves the position on before a checkpoint of the step is saved, and ends the run after its last rollout."""

    def __init__(self, trainer: PpoTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After the optimizer step, before logs and checkpoints."""
        # The rollouts are one pass: a resumed trainer would count its epochs from 0 again.
        state.epoch = state.global_step / max(state.max_steps, 1)
        if self.trainer.after_step():
            control.should_training_stop = True


def _controller(section: PpoSection) -> FixedKLController | AdaptiveKLController:
    if section.kl_control == "fixed":
        return FixedKLController(section.kl_coef)
    return AdaptiveKLController(section.kl_coef, section.kl_target, section.kl_horizon)
