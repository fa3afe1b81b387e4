"""What a forked process owes the one that forked it: to end with it, even by kill -9, and to hold none of its locks.

A worker of a pool waits on a queue that it holds the other end of, and so would wait for ever; and a lock that was
taken before the fork (``flock``) is held until every process that has the file open has ended.
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
