"""A run that goes on from any of its checkpoints ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from chatalign import ppo
from chatalign.engine.ppo_state import LISTS_FILE
from chatalign.errors import CheckpointError

from .conftest import LORA, Make
from .test_run import logged, weights

OVER = {
    "lora": LORA,
    "ppo": {"kl_control": "adaptive", "kl_target": 0.01, "kl_horizon": 20, "total_episodes": 24},
    "train": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None},
}


def go_on_from(original: Path, step: int, folder: Path) -> None:
    """What a kill after `step` leaves of a run."""
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(original / name, folder / name)
    shutil.copytree(original / "checkpoints" / f"checkpoint-{step}", folder / "checkpoints" / f"checkpoint-{step}")


def test_resuming_at_any_step_is_bit_identical(make_recipe: Make) -> None:
    whole = make_recipe("whole", OVER)
    artifact = ppo.run(whole)
    assert len({line["objective/kl_coef"] for line in logged(whole) if "objective/kl_coef" in line}) == 3
    # In the middle of an epoch, at its end, between two rollouts, before the last step.
    for step in (1, 2, 4, 11):
        resumed = make_recipe(f"resumed{step}", OVER)
        go_on_from(Path(whole.output_dir), step, Path(resumed.output_dir))
        again = ppo.run(resumed)
        assert [line["step"] for line in logged(resumed)] == list(range(step + 1, 13))
        assert again.extra == artifact.extra
        for name, tensor in weights(whole).items():
            assert torch.equal(weights(resumed)[name], tensor), name


def test_half_a_rollout_is_refused(make_recipe: Make) -> None:
    whole = make_recipe("whole", {**OVER, "ppo": {"total_episodes": 8}})
    ppo.run(whole)
    resumed = make_recipe("resumed", {**OVER, "ppo": {"total_episodes": 8}})
    go_on_from(Path(whole.output_dir), 1, Path(resumed.output_dir))
    checkpoint = Path(resumed.output_dir) / "checkpoints" / "checkpoint-1"
    (checkpoint / LISTS_FILE).unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    del manifest["files"][LISTS_FILE], manifest["sha256"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(CheckpointError, match="holds half a rollout"):
        ppo.run(resumed)
