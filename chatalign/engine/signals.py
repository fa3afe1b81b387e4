"""Signals that ask a run to end: SIGINT, SIGTERM, SIGUSR1 (Slurm's ``--signal``) and SIGHUP (the terminal is gone).

Training remembers them, saves at the end of its step and ends; a process that waits for others passes them on; all
else is broken off, as by Ctrl-C. Light: no torch here.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A launcher passes on what its processes got by themselves too, sent to a whole group: that is no second request.
_SAME_REQUEST_S = 2.0
STATUS_FILE = "CHATALIGN_STATUS_FILE"  # in the environment
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """`handler` for signals inside; nothing outside the main thread, where signals don't arrive.

    A SIGHUP that is ignored stays so (nohup). A process that is forked inside leaves signals that its group gets to
    its parent, and ends by SIGTERM, with which its parent ends it.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(number, frame)
        elif number == signal.SIGTERM:
            end_by(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        before = {number: signal.signal(number, handle) for number in STOP_SIGNALS if number not in kept}
    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:  # what C code has set can't be set again from here
                signal.signal(number, earlier)


def end_by(number: int) -> None:
    """End this process at once by a signal's own action; a shell then shows status 128 + `number`."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class StopRequest:
    """A context in which the first signal is remembered. The same one again, 2 s later or more, ends the process.

    One of another kind doesn't: schedulers send SIGTERM after SIGUSR1, to a process that may be saving.
    """

    def __init__(self, act: Callable[[signal.Signals], None] | None = None) -> None:
        self.received: signal.Signals | None = None
        self._act = act
        self._first: dict[int, float] = {}
        self._context = handled(self._remember)

    def __enter__(self) -> StopRequest:
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first.setdefault(number, now) >= _SAME_REQUEST_S:
            end_by(number)
        if self.received is None:
            self.received = signal.Signals(number)
            if self._act is not None:
                self._act(self.received)


def breaking_off() -> StopRequest:
    """A context in which the first signal raises KeyboardInterrupt, with its name, and the next ends the process."""

    def break_off(received: signal.Signals) -> None:
        raise KeyboardInterrupt(received.name)

    return StopRequest(break_off)


@contextmanager
def passed_on(send: Callable[[int], None]) -> Iterator[list[signal.Signals]]:
    """Signals inside, each of which `send` is called with too: those who get it know which is a second request."""
    received: list[signal.Signals] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        send(number)

    with handled(pass_on):
        yield received


def note_saved() -> None:
    """Write 130, what a run that was stopped ends with, where the environment asks: launchers make 1 of any status.

    To be called while signals are remembered: a launcher ends the others by one as soon as the first has ended.
    """
    from chatalign.runs import is_main_process  # not needed to refuse a recipe

    if (place := os.environ.get(STATUS_FILE)) and is_main_process():
        Path(place).write_text("130\n", "utf-8")


def in_own_group(prepare: Callable[[int], None] | None, worker: int) -> None:
    """Take a loader's worker, this process, out of its parent's group, then `prepare` it.

    Launchers and terminals signal a whole group; the parent needs batches until its step is done and saved.
    """
    os.setpgrp()
    if prepare is not None:
        prepare(worker)
