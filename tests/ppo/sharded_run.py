"""PPO runs under FSDP2 on CPUs, each held to what it says: no weight is whole on a process.

accelerate shards on GPUs alone, and would run DDP here; torch's FSDP2 itself runs on CPUs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.state import AcceleratorState, DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from chatalign import ppo
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.recipe import PpoRecipe

_init = AcceleratorState.__init__
_release = PpoTrainer.release_policy


def train(recipes: Sequence[PpoRecipe]) -> None:
    """Run each in turn, in this process, which is one of a group."""
    AcceleratorState.__init__ = _on_cpus
    PpoTrainer.release_policy = _checked  # type: ignore[method-assign]
    for recipe in recipes:
        ppo.run(recipe)


def _on_cpus(self: Any, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
    if vars(self).get("fsdp_plugin") is not None:
        self.distributed_type = DistributedType.FSDP


def _checked(self: PpoTrainer) -> None:
    if self.is_fsdp_enabled:
        assert all(isinstance(p, DTensor) for p in self.model.parameters())
        own = sum(p.to_local().numel() for p in self.model.parameters())
        assert own < 0.6 * sum(p.numel() for p in self.model.parameters())
        layers = [module for module in self.model.modules() if type(module).__name__.endswith("DecoderLayer")]
        assert layers
        assert all(isinstance(layer, FSDPModule) for layer in layers)
    _release(self)
