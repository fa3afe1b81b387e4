"""What a signal does to a process: remembered, passed on, an interrupt, or its end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from chatalign.engine import signals
from chatalign.engine.signals import (
    STATUS_FILE,
    STOP_SIGNALS,
    StopRequest,
    breaking_off,
    handled,
    note_saved,
    passed_on,
)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_is_remembered_and_further_ones_leave_the_save_alone() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest() as request:
        assert request.received is None
        send(signal.SIGUSR1)
        send(signal.SIGUSR1)  # at once: passed on by a launcher
        send(signal.SIGTERM)  # what a scheduler sends later
        assert request.received is signal.SIGUSR1
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def ended(work: Callable[[], None]) -> int | None:
    """The exit code of a forked process that does `work`; minus a signal's number where it ended by one."""
    process = get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("context", [StopRequest, breaking_off])
def test_the_same_signal_again_ends_the_process_where_a_person_sent_it(
    context: Callable[[], StopRequest], later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_SAME_REQUEST_S", 1e-9 if later else 60.0)

    def work() -> None:
        with context():
            with suppress(KeyboardInterrupt):
                send(signal.SIGTERM)
            (tmp_path / "outlived the first").touch()
            send(signal.SIGTERM)
            os._exit(7)

    assert ended(work) == (-signal.SIGTERM if later else 7)
    assert list(tmp_path.iterdir())


def test_a_forked_worker_leaves_signals_to_its_parent_which_ends_it_by_sigterm() -> None:
    with StopRequest() as request:

        def work() -> None:
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                send(number)
            assert request.received is None
            send(signal.SIGTERM)
            os._exit(7)

        assert ended(work) == -signal.SIGTERM


def test_a_signal_outside_training_is_an_interrupt_with_a_name() -> None:
    with breaking_off():
        with StopRequest() as request:
            send(signal.SIGHUP)
        assert request.received is signal.SIGHUP
        with pytest.raises(KeyboardInterrupt, match="SIGUSR1"):
            send(signal.SIGUSR1)


def test_nohup_holds_and_other_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            send(signal.SIGHUP)
            assert request.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with handled(lambda number, frame: None):
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failures == []


def test_who_waits_for_others_passes_every_signal_on() -> None:
    sent: list[int] = []
    with passed_on(sent.append) as received:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            send(number)
    assert sent == received == [signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_main_process_writes_the_status_of_a_saved_run(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    note_saved()  # where nobody asks, nothing is written
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    note_saved()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["130\n"] * (rank == "0")
