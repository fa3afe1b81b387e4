"""Forked processes end with the one that forked them, and hold none of its locks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from chatalign.forked import end_with_parent
from chatalign.runs import locked

FORK = get_context("fork")


def pool_of_two(folder: Path, initializer: Callable[[], None] | None) -> None:
    with ProcessPoolExecutor(2, FORK, initializer) as pool:
        for number in range(2):
            pool.submit(leave_pid, folder / f"{number}")
        time.sleep(60)


def leave_pid(file: Path) -> None:
    aside = file.with_suffix(".aside")
    aside.write_text(str(os.getpid()))
    aside.rename(file)
    time.sleep(0.2)  # so that the other worker takes the other file


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def workers_left(folder: Path, initializer: Callable[[], None] | None) -> list[int]:
    """The workers that live on after their parent was killed, a while later."""
    folder.mkdir()
    parent = FORK.Process(target=pool_of_two, args=(folder, initializer))
    parent.start()
    files = [folder / "0", folder / "1"]
    until = time.monotonic() + 30
    while not all(file.exists() for file in files):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    pids = {int(file.read_text()) for file in files}
    until = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at processes through /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    assert workers_left(tmp_path / "ours", end_with_parent) == []
    orphans = workers_left(tmp_path / "plain", None)  # a pool's own workers don't: were it otherwise, we needn't
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert orphans


def run_on(begun: Event) -> None:
    begun.set()
    time.sleep(60)


def test_a_lock_ends_with_who_took_it(tmp_path: Path) -> None:
    begun = FORK.Event()
    with locked(tmp_path / "run"):
        child = FORK.Process(target=run_on, args=(begun,))
        child.start()
    try:
        assert begun.wait(30)
        with locked(tmp_path / "run"):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()
