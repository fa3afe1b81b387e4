"""Two processes share each rollout and each optimizer step: their run is that of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forked import run_ranks

from chatalign import ppo

from .conftest import LORA, Make
from .test_run import logged, weights


@pytest.mark.slow
def test_two_processes_are_one(make_recipe: Make, tmp_path: Path) -> None:
    over = {
        "lora": LORA,
        "ppo": {"kl_control": "adaptive", "kl_target": 0.01, "kl_horizon": 50, "target_kl": 10.0},
        "data": {"eval_fraction": 0.3},
        "train": {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 3},
    }
    one, two = make_recipe("one", over), make_recipe("two", over)
    ppo.run(one)
    run_ranks(2, ppo.run, two, printed=tmp_path / "printed.txt")
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-5)
    for mine, yours in zip(logged(one), logged(two), strict=True):
        assert yours["step"] == mine["step"]
        for key in mine.keys() - {"time_s", "tokens_per_s"}:
            if not key.startswith("speed/"):
                assert yours[key] == pytest.approx(mine[key], abs=1e-5), key
    evaluated = [
        [
            json.loads(line)["eval_objective/score"]
            for line in (Path(recipe.output_dir) / "metrics.jsonl").open()
            if "eval_objective/score" in line
        ]
        for recipe in (one, two)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-4)
    assert len(evaluated[0]) == 2
