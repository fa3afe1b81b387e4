"""Which prompts a rollout answers and which replies an optimizer step trains on: a function of the seed alone.

Nothing here is state: with a seed and a position, any process of any number of processes finds the same rows, so
a resume needs no generator's state and two processes share a step as one would do it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from chatalign.errors import RecipeError
from chatalign.recipe import PpoRecipe

_PROMPTS, _MINIBATCHES, _PTX = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Position:
    """A minibatch: the next one to train on."""

    rollout: int = 0
    epoch: int = 0
    minibatch: int = 0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The plan of a run: `rollouts` × `epochs` × `minibatches` optimizer steps, each one counted."""

    rollouts: int
    rollout_batch: int
    epochs: int
    minibatches: int
    micro_batch: int
    prompts: int
    seed: int
    rank: int = 0
    world_size: int = 1

    @staticmethod
    def of(recipe: PpoRecipe, *, prompts: int, rank: int, world_size: int) -> Schedule:
        """The plan that a recipe describes; raises RecipeError where a minibatch can't be shared by the processes."""
        section = recipe.ppo
        if section.rollout_batch_size % (section.num_mini_batches * world_size):
            raise RecipeError(
                f"`ppo.rollout_batch_size: {section.rollout_batch_size}` must be a multiple of `ppo.num_mini_batches` "
                f"({section.num_mini_batches}) × processes ({world_size})"
            )
        return Schedule(
            rollouts=section.total_episodes // section.rollout_batch_size,
            rollout_batch=section.rollout_batch_size,
            epochs=section.num_ppo_epochs,
            minibatches=section.num_mini_batches,
            micro_batch=recipe.train.per_device_train_batch_size,
            prompts=prompts,
            seed=recipe.train.seed if recipe.train.data_seed is None else recipe.train.data_seed,
            rank=rank,
            world_size=world_size,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, where no rollout is cut short at ``target_kl``."""
        return self.rollouts * self.epochs * self.minibatches

    @property
    def micro_batches(self) -> int:
        """Forward passes that make an optimizer step on one process: gradient accumulation."""
        return -(-self.rollout_batch // (self.minibatches * self.world_size) // self.micro_batch)

    def episodes(self, rollout: int) -> range:
        """The numbers of a rollout's replies, counted from the run's first."""
        return range(rollout * self.rollout_batch, (rollout + 1) * self.rollout_batch)

    def prompt_rows(self, rollout: int) -> list[int]:
        """The prompt that each reply of a rollout answers: one shuffled pass over all prompts after another."""
        rows, order, done = [], np.empty(0, dtype=int), -1
        for episode in self.episodes(rollout):
            round_, place = divmod(episode, self.prompts)
            if round_ != done:
                order, done = self._random(_PROMPTS, round_).permutation(self.prompts), round_
            rows.append(int(order[place]))
        return rows

    def minibatch_rows(self, position: Position) -> list[int]:
        """The replies of a rollout (0 … rollout_batch − 1) that one optimizer step trains on, over all processes."""
        order = self._random(_MINIBATCHES, position.rollout, position.epoch).permutation(self.rollout_batch)
        size = self.rollout_batch // self.minibatches
        return order[position.minibatch * size : (position.minibatch + 1) * size].tolist()

    def ptx_rows(self, position: Position, *, available: int) -> list[int]:
        """As many pretraining rows as an optimizer step has replies, drawn anew for each step."""
        size = self.rollout_batch // self.minibatches
        random = self._random(_PTX, position.rollout, position.epoch, position.minibatch)
        return random.choice(available, size, replace=size > available).tolist()

    def own(self, rows: list[int] | range) -> list[int]:
        """This process's stretch of rows that all processes share."""
        size = len(rows) // self.world_size
        return list(rows[self.rank * size : (self.rank + 1) * size])

    def own_micro_batches(self, rows: list[int]) -> Iterator[list[int]]:
        """This process's replies of an optimizer step, cut into micro-batches."""
        mine = self.own(rows)
        for start in range(0, len(mine), self.micro_batch):
            yield mine[start : start + self.micro_batch]

    def after(self, position: Position, *, skip_rollout: bool = False) -> Position:
        """The minibatch that follows; the next rollout's first where the rest of this one is skipped."""
        if position.minibatch + 1 < self.minibatches and not skip_rollout:
            return replace(position, minibatch=position.minibatch + 1)
        if position.epoch + 1 < self.epochs and not skip_rollout:
            return replace(position, epoch=position.epoch + 1, minibatch=0)
        return Position(rollout=position.rollout + 1)

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *purpose))
