"""Whole runs on a tiny model: full, LoRA, and what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatalign import ppo
from chatalign.recipe import PpoRecipe
from tests.ppo.conftest import LORA

Make = Callable[..., PpoRecipe]


def logged(recipe: PpoRecipe) -> list[dict[str, Any]]:
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("over", [{}, {"lora": LORA}, {"ppo": {"value": "shared"}}, {"lora": LORA, "ppo": {"value": "shared"}}])
def test_a_whole_run(make_recipe: Make, over: dict[str, Any]) -> None:
    recipe = make_recipe("run", over)
    artifact = ppo.run(recipe)
    print(artifact.metrics)
    steps = [line for line in logged(recipe) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
