"""Stages one after another in a launch, some with a fault planted: ``torchrun … launched.py PLAN.json``.

A plan is a list of {"recipe": …, "fault": NAME or null}: one launch, whose imports cost more than what is trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from same_steps import run

from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.engine.reward_trainer import RewardTrainer


@contextmanager
def own_mean(trainer: type[LmTrainer | PpoTrainer]) -> Iterator[None]:
    """Each process divides by its own tokens: the step's loss is a mean of the processes' means."""
    objective = trainer.objective

    def wrong(self: Any, model: Any, batch: Any, _: Any) -> Any:
        own = len(batch["targets"]) if trainer is LmTrainer else len(batch["old_logps"])
        return objective(self, model, batch, own * self.args.world_size)

    yield from _planted(trainer, objective, wrong)


@contextmanager
def heavier() -> Iterator[None]:
    """A reward model's pairs count three millionths too much: far below the bar of a step."""
    objective = RewardTrainer.objective
    yield from _planted(
        RewardTrainer, objective, lambda self, model, batch, items: objective(self, model, batch, items / (1 + 3e-6))
    )


def _planted(trainer: type, right: Callable[..., Any], wrong: Callable[..., Any]) -> Iterator[None]:
    trainer.objective = wrong  # type: ignore[attr-defined]
    yield
    trainer.objective = right  # type: ignore[attr-defined]


FAULTS = {
    "own mean, sft": lambda: own_mean(LmTrainer),
    "own mean, ppo": lambda: own_mean(PpoTrainer),
    "heavier, reward": heavier,
}

if __name__ == "__main__":
    for entry in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        if entry["fault"] is None:
            run(entry["recipe"])
            continue
        with FAULTS[entry["fault"]]():
            run(entry["recipe"])
