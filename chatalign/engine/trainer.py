"""The trainer that every stage subclasses: transformers.Trainer with our batches, losses, metrics and checkpoints.

A stage gives `objective`. The base divides work over micro-batches and processes so that 8 × 1 = 1 × 8, keeps
metrics on the device between logs, and evaluates each row once; checkpoints and signals are its parent's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from chatalign import tracking
from chatalign.engine.batching import (
    Batch,
    BinLoader,
    Bins,
    BinSampler,
    Collate,
    count_tokens,
    make_bins,
    make_loader,
    row_lengths,
    to_device,
)
from chatalign.engine.guard import LossShares, ShareGuard, refuse_uneven_evaluation
from chatalign.engine.isolation import computes_in_half
from chatalign.engine.last_layer import HALF_MULTIPLE
from chatalign.engine.levers import choose, hardware
from chatalign.engine.metrics import MetricSums, Stopwatch
from chatalign.engine.model_setup import set_up
from chatalign.engine.offloading import OffloadedActivations
from chatalign.engine.optimizer_states import make_early
from chatalign.engine.replay import SeenRows
from chatalign.engine.sealed import SealedTrainer
from chatalign.recipe import StageRecipe
from chatalign.runs import Run

Metrics = dict[str, Tensor]
Items = Literal["tokens", "pairs"]


class StageTrainer(SealedTrainer):
    """Trains `model` on prepared rows by `objective`; see the methods that a stage overrides, first below.

    `items` is what a loss is the mean of, over the whole optimizer step and all processes. `packed` says whether
    several rows share a bin (a micro-batch is then so many bins of up to ``data.max_length`` tokens).
    """

    items: ClassVar[Items] = "tokens"
    packed: ClassVar[bool] = False

    def __init__(
        self,
        *,
        recipe: StageRecipe,
        run: Run,
        args: TrainingArguments,
        model: nn.Module,
        tokenizer: Any,
        train_rows: Any,
        eval_rows: Any | None,
        collate: Collate,
    ) -> None:
        self.recipe, self.run, self.collate = recipe, run, collate
        self.saved_use_cache = getattr(model.config, "use_cache", None)  # Trainer turns it off for training
        capacity = recipe.data.max_length if self.packed and recipe.data.packing else None
        eval_bins = None if eval_rows is None else make_bins(eval_rows, row_lengths(eval_rows), capacity)
        super().__init__(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=make_bins(train_rows, row_lengths(train_rows), capacity),
            eval_dataset=eval_bins,
        )
        self.levers = choose(recipe, hardware(use_cpu=args.device.type == "cpu"))
        assert isinstance(self.train_dataset, Bins)
        with self.accelerator.autocast():  # checked on the device and in the precision that it trains in
            self.ran_with = set_up(model, recipe, self.levers, args, rows=self.train_dataset, beside=self.beside())
            half = computes_in_half(model)
        self.multiple = HALF_MULTIPLE if half and args.device.type == "cpu" else 1
        self._activations: AbstractContextManager[Any] = (
            OffloadedActivations(model) if self.levers.offload else nullcontext()
        )
        # The objective's loss is normalised over the optimizer step already; the first name is for transformers
        # before 5.20, which decides by whether the model takes loss arguments.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.metric_sums = MetricSums()
        self.stopwatch = Stopwatch()
        self._tokens = 0  # of this process since they were last added up
        self._first_bad = torch.full((), -1, device=args.device)
        self.shares = LossShares(self)
        self.seen: SeenRows | None = None  # of a stage that trains on prepared rows
        self.add_callback(ShareGuard(self.shares))
        tracking.attach(self, recipe, run)

    # What a stage overrides

    def beside(self) -> list[nn.Module]:
        """Other models that are on the device while this one trains."""
        return []

    def objective(  # type: ignore[override]  # transformers' attribute of this name serves hyperparameter search alone
        self, model: nn.Module, batch: Batch, num_items: float | Tensor
    ) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the optimizer step's loss, and what was measured on the way.

        `num_items` are the tokens or pairs of the whole step, over micro-batches and processes: a loss summed over
        the batch's own items is divided by it. A metric is a tensor of observations, any shape; its mean is logged.
        """
        raise NotImplementedError

    def count_items(self, batch: Batch) -> int:
        """How many items a micro-batch adds to the step."""
        return int(batch["targets"].numel()) if self.items == "tokens" else int(batch["num_sequences"]) // 2

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Turn logged means into what is shown (a perplexity from a loss); called with every set of means."""
        return means

    # Batches

    def get_train_dataloader(self) -> BinLoader:
        """Micro-batches of this process, in an order given by seed and epoch."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        assert isinstance(self.train_dataset, Bins)
        return self._loader(self.train_dataset, self.args.per_device_train_batch_size, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BinLoader:
        """Micro-batches of this process, in the order of the bins; each row once over all processes."""
        bins = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(bins, Bins)
        return self._loader(bins, self.args.per_device_eval_batch_size, None)

    def _loader(self, bins: Bins, batch_size: int, seed: int | None) -> BinLoader:
        return make_loader(bins, self.collate, batch_size=batch_size, seed=seed, args=self.args, multiple=self.multiple)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return to_device(inputs, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int | Tensor:
        count = sum(self.count_items(batch) for batch in batch_samples if not batch.get("filler"))
        if self.args.world_size == 1:
            return max(count, 1)
        return self.reduce(torch.tensor(float(count), device=device)).clamp(min=1)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the recipe, on a CPU with its states made."""
        optimizer = super().create_optimizer(model)
        if self.args.device.type == "cpu" and not self.is_fsdp_enabled:  # FSDP puts other parameters in their place
            make_early(optimizer)
        return optimizer

    # A step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """The objective's loss, times the processes that DDP's mean will divide by; 0 for a filler."""
        assert num_items_in_batch is not None
        filler = bool(inputs.pop("filler", False))
        if self.seen is not None:
            self.seen.add(inputs.pop("bins"))
        with self._activations:
            loss, metrics = self.objective(model, inputs, num_items_in_batch)
        self.metric_sums.add(metrics, filler=filler)
        self._tokens += 0 if filler else count_tokens(inputs)
        self._watch(loss, "loss")
        loss = loss * (0 if filler else self.args.world_size)
        self.shares.add(loss, 0 if filler else self.count_items(inputs), num_items_in_batch)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self.args.fp16:  # fp16's scaler skips such steps itself
            self._watch(norm if isinstance(norm, Tensor) else torch.tensor(norm), "gradient norm")
        return norm

    def _watch(self, value: Tensor, name: str) -> None:
        """Stop on a value that is not finite: at once on a CPU, elsewhere without a sync, at the next log or save."""
        if value.device.type == "cpu":
            if not math.isfinite(value.item()):
                self.refuse_non_finite(self.state.global_step + 1, name)
        else:
            bad = ~value.detach().isfinite() & (self._first_bad < 0)
            self._first_bad = torch.where(bad, self.state.global_step + 1, self._first_bad)

    def _raise_if_bad(self) -> None:
        if (step := int(self._first_bad.item())) >= 0:
            self.refuse_non_finite(step, "loss or gradient norm")

    def floating_point_ops(self, inputs: Batch) -> int:
        """6 × parameters × tokens; the count of parameters is kept, transformers walks the modules at each step."""
        if not hasattr(self, "_parameters"):
            self._parameters = sum(int(p.numel()) for p in self.model.parameters())
        return 6 * self._parameters * count_tokens(inputs)

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the stage's means, tokens seen and tokens a second (training time alone) to each training log."""
        if "loss" in logs:
            self._raise_if_bad()
            logs |= self.derive({**self.metric_sums.drain(self.reduce), "loss": logs["loss"]})
            logs["tokens"] = self.count_tokens()
            logs["tokens_per_s"] = self.tokens_per_s
        super().log(logs, start_time)

    def count_tokens(self) -> int:
        """Tokens that the run has trained on, over processes and resumes; every process must call it."""
        new = self.reduce(torch.tensor(self._tokens, device=self.args.device))
        self._tokens = 0
        self.state.num_input_tokens_seen += int(new.item())
        return self.state.num_input_tokens_seen

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss and metrics over the evaluation rows, each row counted once over all processes."""
        with self.stopwatch.paused():
            started = time.perf_counter()
            means = self._evaluation_means(eval_dataset)
        logs = {f"{metric_key_prefix}_{name}": value for name, value in self.derive(means).items()}
        logs[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _evaluation_means(self, eval_dataset: Any) -> dict[str, float]:
        sums, tokens = MetricSums(), 0
        bins = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(bins, Bins)
        model = self.model_wrapped if self.is_in_train else self.model
        assert isinstance(model, nn.Module)
        training = model.training
        model.eval()
        with torch.no_grad():
            for host_batch in self.get_eval_dataloader(bins):
                filler = bool(host_batch.pop("filler"))
                count = max(self.count_items(host_batch), 1)
                tokens += 0 if filler else count_tokens(host_batch)
                loss, metrics = self.objective(model, self._prepare_inputs(host_batch), count)
                sums.add({**metrics, "loss": loss.expand(count)}, filler=filler)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(training)
        counted = int(self.reduce(torch.tensor(tokens, device=self.args.device)))
        refuse_uneven_evaluation(counted=counted, expected=sum(row_lengths(bins.rows)), processes=self.args.world_size)
        return sums.drain(self.reduce)

    # Checkpoints

    def stage_state(self) -> dict[str, Any]:
        """Which rows the run has seen."""
        return {} if self.seen is None else {"seen": self.seen.state_dict()}

    def load_stage_state(self, state: Mapping[str, Any]) -> None:
        """Take `stage_state` back; raises CheckpointError where this run would see other rows."""
        if self.seen is not None:
            self.seen.go_on_from(state.get("seen"))

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:  # type: ignore[override]
        """Train to the end, or raise Interrupted after a signal, with a checkpoint saved."""
        sampler = getattr(self.get_train_dataloader(), "batch_sampler", None)
        if isinstance(sampler, BinSampler) and isinstance(self.train_dataset, Bins):
            place = resume_from_checkpoint or str(self.run.folder)
            self.seen = SeenRows(self.train_dataset, sampler, place)
        output = super().train(resume_from_checkpoint)
        self._raise_if_bad()
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._raise_if_bad()
        super()._save_checkpoint(model, trial)
