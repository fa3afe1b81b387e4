"""Processes of a test's own, forked from a server that has imported the stages: elsewise each start costs seconds.

All else is the process's own: memory, environment, working folder and exit status.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# As tests/faults names them, so that both have one server. It looks for nothing beside the tests.
PRELOADED = ["chatalign.pipeline", "chatalign.sft", "chatalign.reward", "chatalign.dpo", "chatalign.ppo"]
LIMIT_S = 300


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
    started = [
        start(
            _on_one_thread,
            target,
            *arguments,
            printed=printed,
            environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    for process in started:
        process.join(timeout=LIMIT_S)
        process.kill()  # hung: no-one waits for the others either
    assert [process.exitcode for process in started] == [0] * count, printed.read_text("utf-8", "replace")[-6000:]


def _on_one_thread(target: Callable[..., Any], *arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    target(*arguments)
