"""What a forked process owes the one that forked it: to end with it, even by kill -9.

A worker of a pool waits on a queue that it holds the other end of, and so would wait for ever, with the lock on the
token cache (``flock``): one is held until every process that has the file open has ended. (A run's own lock is let go
where a process is forked, see :func:`chatalign.runs.locked`.)
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """End this process, a child of `multiprocessing`, when its parent ends. To be called first in the child."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this process was not started by multiprocessing")

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
