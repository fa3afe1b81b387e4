"""What is held while a run trains: each check is exact or has a wide margin, and none takes a hundredth of a step.

The numbers are rows of docs/guard.md: the loss's shares (18), the learning rate (19), weights that move (20), adapters
that get gradients (21), evaluation rows counted once (25), processes that draw from different seeds (26).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from chatalign.errors import GuardError

if TYPE_CHECKING:
    from chatalign.engine.sealed import SealedTrainer

# Where reading a number waits for the device or for other processes, not every step is looked at.
_STEPS_BETWEEN_LOOKS = 64
_SAMPLED_WEIGHTS = 4096  # of each tensor
_FEWEST_WEIGHTS = 64
_LORA_B = re.compile(r"lora_B\.([^.]+)\.weight$")


class StepGuard(TrainerCallback):
    """Holds the learning rate, the weights and the adapters of any of our trainers or TRL's; raises GuardError."""

    def __init__(self, trainer: SealedTrainer) -> None:
        self.trainer = trainer
        self.multiplier: Callable[[int], float] | None = None
        self.sampled: list[tuple[Tensor, Tensor, Tensor]] | None = None  # weight, its values before, its gradient ≠ 0
        self.weights_move = False
        self.steps = 0  # of this process
        self.with_gradient: Tensor | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The schedule's horizon is known now."""
        # fp16's scaler skips steps, and DeepSpeed may have a scheduler of its own.
        if not args.fp16 and not self.trainer.is_deepspeed_enabled:
            self.multiplier = schedule_of(args, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step's gradients are there, and the weights are still the old ones."""
        if self.trainer.is_deepspeed_enabled:  # it keeps gradients elsewhere
            return
        self.steps += 1
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self.steps <= 2:
            self._note_gradients(model, last=self.steps == 2 or state.max_steps - state.global_step == 1)
        if not self.weights_move and "adam" in OptimizerNames(args.optim).value and _near_peak(optimizer):
            self.sampled = sampled_weights(model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The weights are the new ones, and the gradients are still there."""
        if self.sampled is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.weights_move = refuse_still_weights(self.sampled, state.global_step + 1, args.learning_rate)
        self.sampled = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The learning rate of the next step is set."""
        if self.multiplier is not None:
            refuse_other_rate(kwargs["optimizer"], self.multiplier(state.global_step), args, state)

    def _note_gradients(self, model: nn.Module, *, last: bool) -> None:
        adapters = list(trained_lora(model))
        if not adapters:
            return
        found = torch.stack([_any(weight.grad, like=weight) for _, _, weight in adapters]).float()
        found = self.trainer.reduce(found)  # a shard may hold none of a gradient
        self.with_gradient = found if self.with_gradient is None else self.with_gradient + found
        if last:
            alone = self.trainer.recipe.stage == "ppo"
            refuse_dead_adapters(adapters, self.with_gradient.tolist(), may_rest=alone)


def schedule_of(args: TrainingArguments, max_steps: int) -> Callable[[int], float] | None:
    """The schedule's closed form, step → share of the peak rate; None for one that depends on what was measured."""
    twin = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=twin,
        num_warmup_steps=args.get_warmup_steps(max_steps),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # a string is parsed by now
    )
    return scheduler.lr_lambdas[0] if isinstance(scheduler, LambdaLR) else None


def refuse_other_rate(optimizer: Any, multiplier: float, args: TrainingArguments, state: TrainerState) -> None:
    """Raise GuardError where the learning rate is not the schedule's at this step."""
    for group in optimizer.param_groups:
        peak, found = group.get("initial_lr"), float(group["lr"])
        if peak is not None and abs(found - peak * multiplier) > 1e-6 * peak:
            name = SchedulerType(args.lr_scheduler_type).value
            raise GuardError(
                f"step {state.global_step}: the learning rate is {found:.4g}, and the {name} schedule over "
                f"{state.max_steps} steps gives {peak * multiplier:.4g}; let nothing but the trainer step the "
                "scheduler, once a step whatever the number of processes"
            )


def _near_peak(optimizer: Any) -> bool:
    """At the start of a warm-up the rate may be below float32's resolution too."""
    return any(
        group["lr"] > 0 and group["lr"] >= 0.5 * group.get("initial_lr", 0.0) for group in optimizer.param_groups
    )


def sampled_weights(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Some of each trained tensor: a view of its weights, their values now, and where their gradient isn't 0."""
    sampled = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            weight, gradient = _local(parameter.detach()), _local(parameter.grad)
            stride = max(1, weight.numel() // _SAMPLED_WEIGHTS)
            view = weight.view(-1)[::stride] if weight.is_contiguous() else weight.flatten()[:0]
            sampled.append((view, view.clone(), gradient.reshape(-1)[::stride][: view.numel()] != 0))
    return sampled


def refuse_still_weights(sampled: Sequence[tuple[Tensor, Tensor, Tensor]], step: int, learning_rate: float) -> bool:
    """Raise GuardError where an update moved fewer than half of the weights that had a gradient.

    False where too few weights had one to say. Adam's update is about the learning rate wherever there is a gradient,
    so that only rounding keeps a weight where it is.
    """
    with_gradient = sum(int(gradient.sum()) for _, _, gradient in sampled)
    moved = sum(int(((now != before) & gradient).sum()) for now, before, gradient in sampled)
    if with_gradient < _FEWEST_WEIGHTS:
        return False
    if moved < 0.5 * with_gradient:
        kinds = sorted({str(now.dtype).removeprefix("torch.") for now, _, _ in sampled})
        raise GuardError(
            f"step {step}: the update moved {moved / with_gradient:.0%} of the weights that had a gradient, the others "
            f"are too coarse ({'+'.join(kinds)}) for a learning rate of {learning_rate:g}; set `model.dtype: float32` "
            "(with `train.bf16: true` for speed), or raise `train.learning_rate`"
        )
    return True


def trained_lora(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name, adapter and weight of each trained lora_B; a mixture's experts aside, to which a batch may send nothing."""
    for name, parameter in model.named_parameters():
        match = _LORA_B.search(name)
        if match and parameter.requires_grad and "expert" not in name:
            yield name, match[1], parameter


def refuse_dead_adapters(
    adapters: Sequence[tuple[str, str, nn.Parameter]], with_gradient: Sequence[float], *, may_rest: bool
) -> None:
    """Raise GuardError where a lora_B never had a gradient in the first two steps.

    With `may_rest` an adapter may be without any: PPO's policy is while the value function warms up.
    """
    dead = [(name, adapter) for (name, adapter, _), count in zip(adapters, with_gradient, strict=True) if not count]
    alive = {adapter for (_, adapter, _), count in zip(adapters, with_gradient, strict=True) if count}
    dead = [(name, adapter) for name, adapter in dead if not may_rest or adapter in alive]
    if dead:
        raise GuardError(
            f"after two steps {len(dead)} of {len(adapters)} LoRA layers have had no gradient, such as {dead[0][0]}: "
            "they would stay as they are; set `train.gradient_checkpointing: false`"
        )


def _any(gradient: Tensor | None, *, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros((), dtype=torch.bool, device=like.device)
    return _local(gradient).ne(0).any()


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor that FSDP2 shards."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class LossShares:
    """What the micro-batches of an optimizer step weigh in its loss; together exactly 1.

    A micro-batch's share is its items over the step's, times whatever its loss is multiplied by before the backward
    pass: dividing once more by the number of micro-batches shows here and in no logged number.
    """

    def __init__(self, trainer: SealedTrainer) -> None:
        self.trainer = trainer
        self._items: float | Tensor = 0.0
        self._whole: float | Tensor = 1.0
        self._looked_at: int | None = None

    def add(self, loss: Tensor, items: int, num_items: float | Tensor) -> None:
        """Take in a micro-batch: its loss as it goes to the backward pass, its items, and the step's."""
        self._whole = num_items
        if not self._due():
            return
        if loss.requires_grad and not self.trainer.is_deepspeed_enabled:
            loss.register_hook(lambda factor: self._weigh(items * factor.detach().float()))
        else:
            self._weigh(items)

    def _weigh(self, items: float | Tensor) -> None:
        self._items = self._items + items

    def _due(self) -> bool:
        step = self.trainer.state.global_step
        if self._looked_at is None:
            self._looked_at = step
        every_step = self.trainer.args.world_size == 1 and self.trainer.args.device.type == "cpu"
        return every_step or (step - self._looked_at) % _STEPS_BETWEEN_LOOKS == 0

    def refuse_uneven(self) -> None:
        """Before the optimizer's step: raise GuardError where the shares don't add up to 1. Every process calls it."""
        if not self._due():
            return
        scaler = self.trainer.accelerator.scaler
        items = torch.as_tensor(self._items, dtype=torch.float32, device=self.trainer.args.device)
        total = self.trainer.reduce(items / (scaler.get_scale() if scaler is not None else 1.0))
        share = float(total) / max(float(self._whole), 1.0)
        self._items = 0.0
        if abs(share - 1) > 1e-4 and float(total) > 0:
            step = self.trainer.state.global_step + 1
            raise GuardError(
                f"step {step}: its micro-batches carry {share:.4g} of its loss in all and not 1: they are weighed "
                "wrongly; take the versions of constraints.txt, and let nothing but the trainer divide the loss"
            )


class ShareGuard(TrainerCallback):
    """Looks at a trainer's `LossShares` before each optimizer step."""

    def __init__(self, shares: LossShares) -> None:
        self.shares = shares

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """All micro-batches are in."""
        self.shares.refuse_uneven()


def refuse_uneven_evaluation(*, counted: int, expected: int, processes: int) -> None:
    """Raise GuardError where an evaluation's tokens, over all processes, are not those of its rows."""
    if counted != expected:
        raise GuardError(
            f"evaluation counted {counted} tokens over {processes} process{'es' if processes > 1 else ''}, and its "
            f"rows hold {expected}: some were counted twice or not at all; let the trainer's own loader divide them"
        )


def refuse_shared_seeds(seeds: Sequence[Sequence[int]], rollout: int) -> None:
    """Raise GuardError where two processes, or two replies of one, draw from the same seed; `seeds` by process."""
    first: dict[int, int] = {}
    for process, own in enumerate(seeds):
        for seed in own:
            if seed in first:
                raise GuardError(
                    f"rollout {rollout}: processes {first[seed]} and {process} both draw a reply from seed {seed}, and "
                    "would learn from the same replies; start them by one accelerate launch, so that each has a rank"
                )
            first[seed] = process
