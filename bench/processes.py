"""Arms as processes of one thread that write one line of JSON: alone, or stepping in turn.

A host's speed can double within a minute, which runs one after the other take for a difference between arms. In turn,
all are started on one core, and each waits while another does a fortieth of its steps (``harness.wait_for_turn``): the
same seconds hit all of them, and what is left is about one per cent (an arm against itself).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 900
SINGLE = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
}


def run_process(command: list[str], name: str, out: Path, core: int | None) -> dict[str, Any] | None:
    """A command of one thread that writes its result to `out`; None, with what it said, where it failed."""
    out.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            pinned(command, core), env=os.environ | SINGLE, capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        print(f"  {name}: no end after {TIME_LIMIT_S} s", flush=True)
        return None
    return result(name, done.returncode, done.stderr, out)


def pinned(command: list[str], core: int | None) -> list[str]:
    """`command` on one core, where one is given."""
    return command if core is None else ["taskset", "-c", str(core), *command]


def result(name: str, status: int, said: str, out: Path) -> dict[str, Any] | None:
    """What an arm that ended wrote; None, with the last of what it said, where it wrote nothing."""
    if status or not out.is_file():
        print(f"  {name}: {(said.strip().splitlines() or ['ended without a result'])[-1][:200]}", flush=True)
        return None
    return json.loads(out.read_text()) | {"arm": name}


class Stepper:
    """An arm's process, and the pipes by which it says that it waits and is told to go on."""

    def __init__(self, command: list[str], name: str, out: Path, core: int | None) -> None:
        self.name, self.out, self.printed = name, out, out.with_suffix(".txt")
        self.waited, tell = os.pipe()
        told, self.told = os.pipe()
        environment = os.environ | SINGLE | {"BENCH_TURNS": f"{tell} {told}"}
        with self.printed.open("w") as file:
            self.process = subprocess.Popen(
                pinned(command, core), env=environment, pass_fds=(tell, told), stdout=file, stderr=file
            )
        os.close(tell)
        os.close(told)

    def waits(self) -> bool:
        """Whether it has done its share and waits; False where it has ended. Killed where it takes too long."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while not select.select([self.waited], [], [], 1)[0]:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                print(f"  {self.name}: no end of its share after {TIME_LIMIT_S} s", flush=True)
                self.process.kill()
        return bool(os.read(self.waited, 1))

    def go_on(self) -> bool:
        """Let it do a share of its steps; False where that was the last."""
        try:
            os.write(self.told, b".")
        except BrokenPipeError:  # killed while it waited
            return False
        return self.waits()

    def result(self) -> dict[str, Any] | None:
        """What it measured."""
        return result(self.name, self.process.wait(), self.printed.read_text(errors="replace"), self.out)

    def close(self) -> None:
        """End it, where it hasn't ended."""
        self.process.kill()
        self.process.wait()
        os.close(self.waited)
        os.close(self.told)


def in_turn(commands: Sequence[tuple[str, list[str]]], core: int | None) -> list[dict[str, Any] | None]:
    """What the arms (name, command without ``--out``) measured, stepping in turn; None for those that failed."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        steppers, waiting = [], []
        for number, (name, command) in enumerate(commands):
            out = Path(folder) / f"{number}.json"
            stepper = Stepper([*command, "--out", str(out)], name, out, core)
            ending.callback(stepper.close)
            steppers.append(stepper)
            if stepper.waits():
                waiting.append(stepper)
        while waiting:
            waiting = [stepper for stepper in waiting if stepper.go_on()]
        return [stepper.result() for stepper in steppers]
