"""PPO in bf16 on a CPU, whose head repeats places to round their number up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatalign import ppo

from .conftest import LORA, Make
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


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_reference_rounds_as_the_policy_does(make_recipe: Make, lora: dict[str, Any] | None) -> None:
    recipe = make_recipe("run", {"lora": lora, "train": {"bf16": True}})
    ppo.run(recipe)
    first = logged(recipe)[0]
    assert first["objective/kl"] == 0
    assert first["objective/kl_k3"] == 0
