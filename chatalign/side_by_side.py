"""Stages of a pipeline that don't need one another, at the same time: each in a process, and on a GPU, of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from chatalign.engine.signals import STOP_SIGNALS, passed_on
from chatalign.errors import ChatalignError, Interrupted, StageStopped
from chatalign.inputs import recipe_fingerprint
from chatalign.launch import EXIT_INTERRUPTED, catch_up, say
from chatalign.permits import Permits
from chatalign.phases import phase
from chatalign.recipe import Recipe
from chatalign.runs import finished, open_run, status

LOG_FILE = "log.txt"
_LOOK_EVERY_S = 0.1


@dataclass
class Progress:
    """A pipeline while it runs: its stages in order, what each needs, and what has become of them."""

    stages: Mapping[str, Recipe]
    needs: Mapping[str, set[str]]
    statuses: dict[str, str] = field(default_factory=dict)  # skipped, resumed, ran, failed, interrupted or blocked
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, ChatalignError] = field(default_factory=dict)  # of blocked stages too

    def failed(self, name: str, error: ChatalignError) -> None:
        """Note that a stage can't be had: it failed, or was stopped by itself."""
        self.statuses[name] = "interrupted" if isinstance(error, Interrupted) else "failed"
        self.failures[name] = error

    def blocked(self, name: str) -> bool:
        """Whether a stage needs one that can't be had; it is then noted as such."""
        causes = [self.failures[need] for need in self.needs[name] if need in self.failures]
        if causes:
            self.statuses[name], self.failures[name] = "blocked", causes[0]
        return bool(causes)

    def ready(self) -> list[str]:
        """Stages that nothing is known of yet and whose needs are met."""
        return [n for n in self.stages if n not in self.statuses and self.needs[n] & self.stages.keys() <= self.done]

    @property
    def done(self) -> set[str]:
        """Stages that are up to date."""
        return {name for name, state in self.statuses.items() if state in ("skipped", "resumed", "ran")}

    def raise_failure(self) -> None:
        """Raise the first failure, else the first stop, with what it cost; nothing where there is neither."""
        states = ("failed", "interrupted", "blocked")
        failed, stopped, blocked = ([name for name, state in self.statuses.items() if state == s] for s in states)
        if not failed and not stopped:
            return
        first, *others = failed + stopped
        too = f" ({', '.join(f'{name} {self.statuses[name]}' for name in others)} too)" if others else ""
        left_out = f"; left out: {', '.join(blocked)}" if blocked else ""
        error = self.failures[first]
        message = f"stage {first}: {error}{too}{left_out}"
        renamed = type(error).__new__(type(error), message)  # whatever its constructor takes
        renamed.__dict__.update(vars(error))
        raise renamed from error


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    device: int
    state: str
    since: float


def side_by_side(progress: Progress, modules: Mapping[str, str], *, jobs: int, permits: Permits) -> None:
    """Run a pipeline's stages, up to `jobs` at once, in the order in which what they need is there.

    Raises Interrupted after a signal, when every stage has saved and ended.
    """
    running: dict[str, _Running] = {}
    with passed_on(lambda number: _send(running, number)) as received:
        while True:
            free = sorted(set(range(jobs)) - {stage.device for stage in running.values()})
            waiting = [] if received else [name for name in progress.ready() if name not in running]
            for name, device in zip(waiting, free, strict=False):
                _start(progress, name, modules, device, permits, running)
                if received:  # while it was started
                    _send(running, received[-1])
                    break
            _collect(progress, running)
            for name in progress.stages:
                if name not in progress.statuses and name not in running:
                    progress.blocked(name)
            if not running and (received or not progress.ready()):
                break
            time.sleep(_LOOK_EVERY_S)
    if received and progress.done != progress.stages.keys():
        raise Interrupted("stopped; the same command goes on")


def _start(
    progress: Progress,
    name: str,
    modules: Mapping[str, str],
    device: int,
    permits: Permits,
    running: dict[str, _Running],
) -> None:
    recipe = progress.stages[name]
    try:
        with phase("check"):
            if not permits.force and finished(recipe) is not None:
                say(f"{name}: fresh, skipped")
                catch_up(recipe)
                progress.statuses[name] = "skipped"
                return
            permits.make_way(name)
            state = status(recipe.output_dir, recipe_fingerprint(recipe))
            run = open_run(recipe)
    except ChatalignError as error:
        progress.failed(name, error)
        say(f"{name}: failed: {error}")
        return
    path, log = run.folder / "recipe.yaml", run.folder / LOG_FILE
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "utf-8")
    say(f"{name}: {'resuming' if state == 'resumable' else 'running'} ({recipe.stage}), its lines go to {log}")
    command = [sys.executable, "-m", modules[recipe.stage], str(path)]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | _device(device), start_new_session=True
        )
    running[name] = _Running(process, device, "resumed" if state == "resumable" else "ran", time.perf_counter())


def _device(number: int) -> dict[str, str]:
    """The environment that shows a process one GPU, of those that this one is shown."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [device.strip() for device in visible.split(",")] if visible else []
    return {"CUDA_VISIBLE_DEVICES": devices[number] if number < len(devices) else str(number)}


def _collect(progress: Progress, running: dict[str, _Running]) -> None:
    """Take the stages that ended out of `running`, and note how."""
    for name in [name for name, stage in running.items() if stage.process.poll() is not None]:
        stage = running.pop(name)
        log = Path(progress.stages[name].output_dir) / LOG_FILE
        code = stage.process.returncode
        if code == 0:
            progress.statuses[name] = stage.state
            progress.seconds[name] = {"train": time.perf_counter() - stage.since}  # it keeps an account of its own
            say(f"{name}: finished")
        else:
            words = _last_line(log) if code > 0 else f"ended by {signal.Signals(-code).name}"
            stopped = code == EXIT_INTERRUPTED or -code in STOP_SIGNALS
            error = (StageStopped if stopped else ChatalignError)(f"{words} (all of it in {log})")
            progress.failed(name, error)
            say(f"{name}: {progress.statuses[name]}: {error}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("chatalign: ") if lines else "it ended without a word"


def _send(running: Mapping[str, _Running], number: int) -> None:
    """Send a signal to every stage that runs, so that it saves and ends."""
    for stage in list(running.values()):
        if stage.process.poll() is None:
            stage.process.send_signal(number)
