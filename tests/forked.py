"""Processes of a test's own, forked from a server that has imported the stages: elsewise each start costs seconds.

All else is the process's own: memory, environment, working folder and exit status.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# As tests/faults names them, so that both have one server. It looks for nothing beside the tests.
PRELOADED = ["chatalign.pipeline", "chatalign.sft", "chatalign.reward", "chatalign.dpo", "chatalign.ppo"]
LIMIT_S = 300
_DUMP_S = 0.95 * LIMIT_S


def start(
    target: Callable[..., Any],
    *arguments: Any,
    printed: Path,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """A started process that runs `target` in `folder`; what it prints goes to the file `printed`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_begin, args=(target, arguments, printed, folder, dict(environment or {})))
    process.start()
    return process


def _begin(
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    printed: Path,
    folder: Path | None,
    environment: Mapping[str, str],
) -> None:
    gc.freeze()  # or each collection would copy what the server imported
    os.environ.update(environment)
    os.chdir(folder or os.getcwd())
    with printed.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*arguments)


def run_ranks(
    count: int, target: Callable[..., Any], *arguments: Any, printed: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run `target` in `count` processes of one group on this machine, as a launcher does; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}
    files = [printed.with_name(f"{printed.stem}.{rank}{printed.suffix}") for rank in range(count)]
    started = [
        start(
            _rank,
            target,
            arguments,
            _stacks(file),
            printed=file,
            environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, file in enumerate(files)
    ]
    ends = time.monotonic() + LIMIT_S
    for process in started:
        process.join(timeout=max(0.0, ends - time.monotonic()))
    for process in started:
        process.kill()
        process.join()
    codes = [process.exitcode for process in started]
    assert codes == [0] * count, f"ranks ended with {codes}\n" + "".join(map(_said, files))


def _rank(target: Callable[..., Any], arguments: tuple[Any, ...], stacks: Path) -> None:
    import torch

    torch.set_num_threads(1)
    with stacks.open("w") as file:
        faulthandler.enable(file)  # where it crashes, if it does
        faulthandler.dump_traceback_later(_DUMP_S, file=file)  # or hangs
        target(*arguments)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()


def _stacks(printed: Path) -> Path:
    return printed.with_suffix(".stacks")


def _said(printed: Path) -> str:
    """What a rank printed last and, where it crashed or hung, which thread was where: in short, as CI's record is."""
    stacks = _stacks(printed).read_text()
    _, current, stack = stacks.partition("Current thread")
    stack = stack if current else stacks.rpartition("Thread 0x")[2]  # a hung one's main thread is the last
    at = f"it crashed, or was after {_DUMP_S:.0f} s, at {stack[:1000]}\n" if stack else ""
    return f"{at}{printed.stem} said last:\n{printed.read_text('utf-8', 'replace')[-800:]}\n"
