"""SIGKILL at points drawn at random, while replies are drawn, in an update, in a save: the end is bit for bit one."""

from __future__ import annotations

import multiprocessing
import random
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import PRELOADED

from chatalign import checkpoint, ppo
from chatalign.engine.ppo_state import LISTS_FILE
from chatalign.recipe import PpoRecipe

from . import interrupted_run
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
CALLS = {"reply": 24, "backward": 24, "save": 12}


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
        for place, count in CALLS.items()
        for third in range(3)
    ]


@pytest.mark.slow
def test_a_run_that_is_cut_off_at_nine_points_ends_the_same(make_recipe: Make, points: list[tuple[str, int]]) -> None:
    """All nine in turn on one run: each process is cut off a little later, the last goes to the end."""
    whole, resumed = make_recipe("whole", OVER), make_recipe("resumed", OVER)
    ppo.run(whole)
    cut = 0

    def end() -> None:
        raise Killed

    for place, at in points:
        undo = interrupted_run.at_call(place, max(1, at // 3), end)
        try:
            ppo.run(resumed)
        except Killed:
            cut += 1
        undo()
    ppo.run(resumed)
    assert cut >= 6, "most of the cuts must fall before the run's end"
    same_end(resumed, whole)


def launched(
    recipe: PpoRecipe, kill: tuple[str, int] | None = None, *, processes: int = 1, number: int = signal.SIGKILL
) -> list[int]:
    """Exit codes of a run in processes of its own, the last of which is killed; its end is that of all.

    With another `number` it gets that signal, and the others end by themselves.

    They come from a server that has imported everything once: a start costs more than what is trained here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(processes)} if processes > 1 else {}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        dies = kill if rank == processes - 1 else None
        started.append(context.Process(target=interrupted_run.run, args=(recipe, shared | own, dies, number)))
        started[-1].start()
    started[-1].join(timeout=300)
    for process in started:
        if kill is not None and number == signal.SIGKILL:
            process.kill()  # as a launcher does where one of its processes is gone
        process.join(timeout=300)
    return [int(process.exitcode or 0) for process in started]


@pytest.mark.slow
def test_sigkill_leaves_nothing_that_changes_the_end(make_recipe: Make, points: list[tuple[str, int]]) -> None:
    whole, resumed = make_recipe("whole", OVER), make_recipe("resumed", OVER)
    ppo.run(whole)
    for place, at in (points[1], points[4], points[8]):
        # Each counts from where the last was killed, so that all three are met before the end.
        assert launched(resumed, (place, max(1, at // 3))) == [-signal.SIGKILL]
        assert not (Path(resumed.output_dir) / "artifact.json").exists()
    assert launched(resumed) == [0]
    same_end(resumed, whole)


@pytest.mark.slow
def test_two_processes_killed_or_stopped_together(make_recipe: Make) -> None:
    """One of the two dies in the middle of an update, or gets a signal while it draws replies; both go on bit for bit.

    What has drawn replies saves them: they are not drawn again.
    """
    over = {**OVER, "ppo": {**OVER["ppo"], "total_episodes": 16}}
    whole, resumed, stopped = (make_recipe(name, over) for name in ("whole", "resumed", "stopped"))
    assert launched(whole, processes=2) == [0, 0]
    assert launched(resumed, ("backward", 7), processes=2)[1] == -signal.SIGKILL
    assert not (Path(resumed.output_dir) / "artifact.json").exists()
    assert launched(resumed, processes=2) == [0, 0]
    assert 1 <= logged(resumed)[0]["step"] < 8
    assert launched(stopped, ("reply", 12), processes=2, number=signal.SIGUSR1) == [130, 130]
    newest = checkpoint.list_checkpoints(Path(stopped.output_dir) / "checkpoints")[-1]
    assert newest.name == "checkpoint-5"  # the first of the second rollout's steps
    assert (newest / LISTS_FILE).is_file()
    assert launched(stopped, processes=2) == [0, 0]
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
        assert torch.equal(weights(stopped)[name], tensor), name
