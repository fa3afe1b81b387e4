"""SIGINT, SIGTERM and SIGUSR1 (Slurm's ``--signal``) ask the trainer to save and stop; a second ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context in which the first signal is remembered. Does nothing outside the main thread (signals go there)."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each, handler in self._before.items():  # so that a second signal is not waited on
            signal.signal(each, handler)
