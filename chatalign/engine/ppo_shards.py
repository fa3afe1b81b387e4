"""PPO on weights that FSDP2 shards: gathered once for a rollout, and in checkpoints whole.

Processes draw different numbers of tokens, so that no collective may run while they decode: every process gathers all
weights before, and drops what isn't its own afterwards. An update gathers a layer at a time, as any training does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from transformers import TrainingArguments

from chatalign.engine.ppo_model import PpoModel
from chatalign.engine.trainer import StageTrainer
from chatalign.engine.weights import load_trainable
from chatalign.errors import ModelError
from chatalign.recipe import PpoRecipe

_SCHEDULER_FILE = "scheduler.pt"  # transformers' own name, under which it looks for it


class ShardedTrainer(StageTrainer):
    """A StageTrainer of a `PpoModel` that can be sharded; without FSDP it changes nothing."""

    model: PpoModel

    def prepare_shards(self) -> None:
        """Before training: settle precisions; raises ModelError for what can't be sharded."""
        assert isinstance(self.recipe, PpoRecipe)
        state = self.accelerator.state
        refuse_unshardable(self.recipe, self.model, self.args, state)
        if self.is_fsdp_enabled:
            # accelerate's own policy rounds what leaves the model, log-probabilities and values too. Autocast rounds
            # as it does without shards, so that a run is the same.
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Updates run under autocast as rollouts do: accelerate leaves it out under FSDP2."""
        if self.is_fsdp_enabled:
            context: AbstractContextManager[Any] = self.accelerator.autocast()
            return context
        return super().autocast_smart_context_manager(cache_enabled)

    def gathered(self) -> AbstractContextManager[None]:
        """All weights of the model as they are, on every process; see :func:`gathered`."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        return gathered(self.model, frees_layers=bool(getattr(plugin, "reshard_after_forward", True)))

    # Checkpoints: trainable weights in one file, as without shards

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers would write the frozen weights too."""
        if self.is_fsdp_enabled:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainable(self.model, Path(resume_from_checkpoint))


def refuse_unshardable(recipe: PpoRecipe, model: nn.Module, args: TrainingArguments, state: Any) -> None:
    """Raise ModelError where accelerate's `state` asks for shards that this run can't have; before any rollout."""
    if getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", 0) == 3:
        raise ModelError("PPO does not train under ZeRO-3: launch with accelerate_configs/fsdp2.yaml or zero2.yaml")
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ModelError("PPO shards with FSDP version 2: set `fsdp_version: 2`, as accelerate_configs/fsdp2.yaml does")
    if plugin.cpu_ram_efficient_loading:
        raise ModelError("PPO loads its weights on every process: set `fsdp_cpu_ram_efficient_loading: false`")
    if plugin.activation_checkpointing:  # it would recompute a layer under whichever adapter is active by then
        raise ModelError(
            "FSDP's own checkpointing knows of no adapters: set `fsdp_activation_checkpointing: false`, and "
            "`train.gradient_checkpointing: true` in the recipe"
        )
    if recipe.quantization is not None:
        raise ModelError("FSDP can't shard `quantization`'s weights: launch with accelerate_configs/ddp.yaml")
    if args.fp16:
        raise ModelError("PPO's sharded weights train in bf16 or float32: set `train.fp16: false`")
    if recipe.ppo.rollout_engine != "transformers":
        raise ModelError(
            f"`ppo.rollout_engine: {recipe.ppo.rollout_engine}` reads weights that are not sharded: launch with "
            f"accelerate_configs/ddp.yaml, or set `ppo.rollout_engine: transformers`"
        )
    precisions = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(precisions) > 1 and not args.bf16:
        raise ModelError(
            f"FSDP shards trainable weights of one precision, and these are in {' and '.join(sorted(precisions))}: set "
            f"`model.dtype: float32`, or `train.bf16: true`"
        )


@contextmanager
def gathered(model: PpoModel, *, frees_layers: bool = True) -> Iterator[None]:
    """All weights whole on every process, for forward passes of any part of `model` without gradients.

    No collective runs inside; every process enters and leaves, between optimizer steps. A change of a weight inside
    is lost. `frees_layers` is whether an update drops a layer after its forward pass. Nothing happens to a model that
    isn't sharded.
    """
    units: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield
        return
    # FSDP takes for its root the module whose forward pass is first: not the policy inside.
    if "no_pass" not in vars(model):
        register_fsdp_forward_method(model, "no_pass")
    model.no_pass()
    frees = [unit for unit in units if unit is not model]
    for unit in units:
        unit.unshard()
    for unit in frees:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in frees:
            unit.set_reshard_after_forward(frees_layers, recurse=False)
        for unit in units:
            unit.reshard()
