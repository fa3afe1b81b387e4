"""Rows, minibatches and processes: each reply is trained on once an epoch, whoever holds it."""

from __future__ import annotations

from collections import Counter

import pytest

from chatalign.engine.ppo_schedule import Position, Schedule
from chatalign.errors import RecipeError

from .conftest import Make

PLAN = Schedule(rollouts=3, rollout_batch=12, epochs=2, minibatches=3, micro_batch=2, prompts=5, seed=7)


def test_positions_visit_every_minibatch_once() -> None:
    position, seen = Position(), []
    while position.rollout < PLAN.rollouts:
        seen.append(position)
        position = PLAN.after(position)
    assert len(seen) == len(set(seen)) == PLAN.steps == 3 * 2 * 3


def test_a_skip_goes_to_the_next_rollout() -> None:
    assert PLAN.after(Position(rollout=1, epoch=0, minibatch=1), skip_rollout=True) == Position(rollout=2)


def test_an_epoch_trains_on_each_reply_once_in_an_order_of_its_own() -> None:
    orders = []
    for epoch in range(2):
        minibatches = [PLAN.minibatch_rows(Position(rollout=1, epoch=epoch, minibatch=m)) for m in range(3)]
        assert [len(rows) for rows in minibatches] == [4, 4, 4]
        orders.append([row for rows in minibatches for row in rows])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1]


def test_prompts_come_in_whole_passes() -> None:
    drawn = [row for rollout in range(3) for row in PLAN.prompt_rows(rollout)]
    passes = [drawn[start : start + 5] for start in range(0, 35, 5)]
    assert all(sorted(rows) == list(range(5)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) > 1
    assert [PLAN.prompt_rows(rollout) for rollout in range(3)] == [drawn[:12], drawn[12:24], drawn[24:]]


def test_processes_share_a_step_without_gap_or_overlap() -> None:
    ranks = [Schedule(**{**vars(PLAN), "rank": rank, "world_size": 2}) for rank in range(2)]
    rows = PLAN.minibatch_rows(Position())
    shares = [[row for micro in plan.own_micro_batches(rows) for row in micro] for plan in ranks]
    assert shares[0] + shares[1] == rows
    assert {plan.micro_batches for plan in ranks} == {1}
    assert PLAN.micro_batches == 2
    assert Counter(row for plan in ranks for row in plan.own(plan.prompt_rows(0))) == Counter(PLAN.prompt_rows(0))


def test_seeds_change_everything_and_positions_alone_decide() -> None:
    other = Schedule(**{**vars(PLAN), "seed": 8})
    assert other.prompt_rows(0) != PLAN.prompt_rows(0)
    assert other.minibatch_rows(Position()) != PLAN.minibatch_rows(Position())
    assert Schedule(**vars(PLAN)).minibatch_rows(Position(epoch=1)) == PLAN.minibatch_rows(Position(epoch=1))


def test_a_minibatch_that_processes_cannot_share_is_refused(make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match=r"must be a multiple of `ppo\.num_mini_batches` \(2\) × processes \(3\)"):
        Schedule.of(make_recipe("run"), prompts=5, rank=0, world_size=3)
