"""PPO in bf16 on a CPU, whose head repeats places to round their number up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatalign import ppo
from chatalign.engine.ppo_guard import RatioGuard

from .conftest import LORA, Make, built
from .test_run import logged


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_values_and_log_probabilities_are_one_a_token(
    make_recipe: Make, value: str, lora: dict[str, Any] | None
) -> None:
    recipe = make_recipe("run", {"lora": lora, "ppo": {"value": value}, "train": {"bf16": True}})
    ppo.run(recipe)
    lines = logged(recipe)
    assert len(lines) == 2 * 2 * 2
    assert all(line["grad_norm"] > 0 and torch.tensor(line["loss/value"]).isfinite() for line in lines)


def test_the_reference_runs_the_policys_kernels(make_recipe: Make) -> None:
    """Else the KL of the first rollout is a few thousandths in half precision, in place of 0."""
    trainer = built(make_recipe("run", {"train": {"bf16": True}}))
    policy, reference = (
        {name for name, module in model.named_modules() if "forward" in vars(module)}
        for model in (trainer.model.policy, trainer.play.collector.reference.module)
    )
    assert len(policy) > 4
    assert reference == policy
    trainer.train()
    first = next(line for line in trainer.state.log_history if "objective/kl" in line)
    assert first["objective/kl"] == first["objective/kl_k3"] == 0


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_guard_changes_no_weight(
    make_recipe: Make, lora: dict[str, Any] | None, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for guarded in (True, False):
        recipe = make_recipe(f"run-{guarded}", {"lora": lora, "train": {"bf16": bf16}, "ppo": {"total_episodes": 8}})
        if not guarded:
            monkeypatch.setattr(RatioGuard, "hold_still", lambda self, forward: None)
        trainer = built(recipe)
        trainer.train()
        runs.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
