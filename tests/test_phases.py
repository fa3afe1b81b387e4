"""The account of a stage's seconds: what is inside what, what counts as overhead, and a chain's summary of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import chatalign.phases as phases
from chatalign.launch import around
from chatalign.phases import account, open_account, overhead, phase


class Clock:
    """A clock that stands still until it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    hand = Clock()
    monkeypatch.setattr(time, "perf_counter", hand)
    monkeypatch.setattr(phases, "_since", 0.0)
    open_account()
    yield hand
    monkeypatch.undo()
    open_account()


def test_each_second_is_charged_once_and_to_the_innermost_phase(clock: Clock) -> None:
    with phase("model"):
        clock.now = 1
        with phase("data"):
            clock.now = 3
        clock.now = 7
    clock.now = 8
    assert account() == {"model": 5.0, "data": 2.0, "other": 1.0}
    open_account()
    assert account() == {}


def test_a_phase_that_fails_is_closed(clock: Clock) -> None:
    @phase("train")
    def fail() -> None:
        clock.now = 2
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    clock.now = 3
    assert account() == {"train": 2.0, "other": 1.0}


def test_loops_are_no_overhead() -> None:
    seconds = {"import": 4.0, "train": 60.0, "score": 3.0, "save": 0.26}
    assert overhead(seconds) == 4.26
    assert around(seconds) == "4.3 s beside training (import 4.0, save 0.3)"
