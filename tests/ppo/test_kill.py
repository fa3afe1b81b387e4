"""SIGKILL at points drawn at random, while replies are drawn, in an update, in a save: the end is bit for bit one."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chatalign import checkpoint, ppo
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.recipe import PpoRecipe
from chatalign.rollout.sampler import Sampler

from .conftest import LORA, Make
from .test_run import logged, weights

OVER: dict[str, Any] = {
    "lora": LORA,
    "ppo": {
        "kl_control": "adaptive",
        "kl_target": 0.01,
        "kl_horizon": 20,
        "total_episodes": 24,
        "value_warmup_rollouts": 1,
        "whiten_rewards": True,
    },
    "train": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_grad_norm": 0.5},
}
# In 24 episodes: 3 rollouts of 8 tokens in one batch of prompts, 12 steps of 2 micro-batches, 12 checkpoints.
CALLS = {
    "reply": (Sampler, "draw", 24),
    "backward": (PpoTrainer, "objective", 24),
    "save": (checkpoint, "write_manifest", 12),
}
SCRIPT = Path(__file__).with_name("interrupted_run.py")


class Killed(BaseException):
    """Stands in for SIGKILL within a process: nothing in the product catches it."""


def same_end(resumed: PpoRecipe, whole: PpoRecipe) -> None:
    assert logged(resumed)[-1]["step"] == 12
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name


@pytest.fixture(scope="module")
def points() -> list[tuple[str, int]]:
    """Three calls of each place, other ones in each of the three rollouts."""
    draw = random.Random(20)
    return [
        (place, 1 + third * count // 3 + draw.randrange(count // 3))
        for place, (_, _, count) in CALLS.items()
        for third in range(3)
    ]


def test_a_run_that_is_cut_off_at_nine_points_ends_the_same(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, points: list[tuple[str, int]]
) -> None:
    """All nine in turn on one run: each process is cut off a little later, the last goes to the end."""
    whole, resumed = make_recipe("whole", OVER), make_recipe("resumed", OVER)
    ppo.run(whole)
    cut = 0
    for place, at in points:
        owner, name, _ = CALLS[place]
        right, calls = getattr(owner, name), 0

        def interrupted(*args: Any, _right: Any = right, _at: int = max(1, at // 3), **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == _at:
                raise Killed
            return _right(*args, **kwargs)

        monkeypatch.setattr(owner, name, interrupted)
        try:
            ppo.run(resumed)
        except Killed:
            cut += 1
        monkeypatch.setattr(owner, name, right)
    ppo.run(resumed)
    assert cut >= 6, "most of the cuts must fall before the run's end"
    same_end(resumed, whole)


def written(recipe: PpoRecipe) -> str:
    path = Path(recipe.output_dir).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), "utf-8")
    return str(path)


def launched(recipe: PpoRecipe, *kill: str, processes: int = 1) -> int:
    """The exit code of a run in processes of its own; negative signal numbers are torchrun's 1."""
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=static"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    run = subprocess.run(
        [*command, str(SCRIPT), written(recipe), *kill],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    return run.returncode


@pytest.mark.slow
def test_sigkill_leaves_nothing_that_changes_the_end(make_recipe: Make, points: list[tuple[str, int]]) -> None:
    whole, resumed = make_recipe("whole", OVER), make_recipe("resumed", OVER)
    ppo.run(whole)
    for place, at in (points[1], points[4], points[8]):
        # Each counts from where the last was killed, so that all three are met before the end.
        assert launched(resumed, place, str(max(1, at // 3))) == -signal.SIGKILL
        assert not (Path(resumed.output_dir) / "artifact.json").exists()
    ppo.run(resumed)
    same_end(resumed, whole)


@pytest.mark.slow
def test_two_processes_killed_together(make_recipe: Make) -> None:
    """One of the two dies in the middle of an update and takes the other with it; both go on bit for bit."""
    over = {**OVER, "ppo": {**OVER["ppo"], "total_episodes": 16}}
    whole, resumed = make_recipe("whole", over), make_recipe("resumed", over)
    assert launched(whole, "never", "0", processes=2) == 0
    assert launched(resumed, "backward", "7", "1", processes=2) != 0
    assert not (Path(resumed.output_dir) / "artifact.json").exists()
    assert launched(resumed, "never", "0", processes=2) == 0
    first = logged(resumed)[0]["step"]
    assert 1 <= first < 8
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
