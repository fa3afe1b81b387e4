"""Policy and value function have a backward pass each: the same numbers, with one side's activations at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from chatalign.engine.ppo_trainer import PpoTrainer

from .conftest import LORA, Make, built


def trained(trainer: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], int]:
    """Weights, logs, and the most bytes that a step kept for its backward passes."""
    kept: dict[int, int] = {}
    most = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            kept[id(self)] = tensor.numel() * tensor.element_size()
            most = max(most, sum(kept.values()))

        def __del__(self) -> None:
            kept.pop(id(self), None)

    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        trainer.train()
    named = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    names = ("loss", "grad_norm", "loss/value", "loss/policy", "value/clipfrac")
    return named, [{name: line[name] for name in names} for line in trainer.state.log_history if "loss" in line], most


@pytest.mark.parametrize("kind", ["adapters", "full", "critic"])
def test_apart_is_together(
    make_recipe: Make, reward_full_run: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    over: dict[str, Any] = {} if kind == "full" else {"lora": LORA}
    over |= {"value_model": {"name_or_path": str(reward_full_run)}} if kind == "critic" else {}
    apart, apart_logs, apart_bytes = trained(built(make_recipe("apart", over)))
    monkeypatch.setattr(PpoTrainer, "_sides_apart", False)
    together, together_logs, together_bytes = trained(built(make_recipe("together", over)))
    assert apart_logs == together_logs
    assert all(torch.equal(apart[name], tensor) for name, tensor in together.items())
    assert apart_bytes < 0.7 * together_bytes


def test_a_shared_trunk_has_one(make_recipe: Make) -> None:
    assert not built(make_recipe("run", {"ppo": {"value": "shared"}}))._sides_apart
