"""Work beside a pipeline's training: the later stages' rows are tokenized, and the finished ones' reports written.

In two processes that are forked once everything is imported and before torch computes anything, so that they import
nothing again. What they do is what a stage does by itself: it finds its rows in the cache, waits for who is writing
them, or writes them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from chatalign.artifact import ARTIFACT_FILE
from chatalign.engine.signals import STOP_SIGNALS
from chatalign.errors import ChatalignError
from chatalign.forked import end_with_parent
from chatalign.launch import say, write_report
from chatalign.recipe import Recipe


class Beside:
    """A pipeline's two processes; a context, after which they are gone.

    Without a second core, or where processes can't be forked, all is done in its turn.
    """

    def __init__(self, stages: Mapping[str, Recipe]) -> None:
        self._stages = stages
        self._rows: _Worker | None = None
        self._reports: _Worker | None = None
        self._reported: list[str] = []  # run folders, in the order that answers come in

    def begin(self, first: Recipe) -> None:
        """Fork, where torch is imported and has computed nothing yet; `first` is the stage that is about to run."""
        if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
            return
        self._rows, self._reports = _Worker(), _Worker()
        recipes = list(self._stages.values())
        for recipe in recipes[recipes.index(first) + 1 :]:
            if recipe.stage != "eval" and not Path(recipe.output_dir, ARTIFACT_FILE).is_file():
                self._rows.submit(_prepare_rows, recipe, dict(self._stages))

    def report(self, folder: str) -> None:
        """Have a finished run's report written."""
        if self._reports is None:
            write_report(folder)
        else:
            from chatalign.report import write_run_report

            self._reports.submit(write_run_report, folder)
            self._reported.append(folder)

    def wait(self) -> None:
        """Wait for the reports, and write those here that a process left that was killed; raises what one raised."""
        for folder in self._reported:
            assert self._reports is not None
            try:
                say(f"report: {self._reports.answer()}")
            except (EOFError, OSError):
                write_report(folder)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (self._rows, self._reports):
            if worker is not None:
                worker.stop()


class _Worker:
    """A forked process that calls functions in the order in which they are given, and answers in that order."""

    def __init__(self) -> None:
        context = get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Have it called some time, or never where the process has ended."""
        with suppress(BrokenPipeError):
            self._pipe.send((work, arguments))

    def answer(self) -> Any:
        """What the oldest call without an answer returned, or raised; EOFError where the process has ended."""
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """End it now, whatever it does."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    end_with_parent()
    for number in STOP_SIGNALS:  # sent to the whole group: the parent knows what to do, and ends this by SIGTERM
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    while True:
        work, arguments = pipe.recv()
        try:
            pipe.send(work(*arguments))
        except Exception as error:
            pipe.send(ChatalignError(str(error) if isinstance(error, ChatalignError) else repr(error)))


def _prepare_rows(recipe: Any, stages: Mapping[str, Recipe]) -> None:
    """Put a stage's tokens into the cache; what is wrong with its rows it says itself, when its turn has come."""
    import datasets

    from chatalign.check import data_sections
    from chatalign.data import prepare
    from chatalign.models.tokenizer import load_tokenizer
    from chatalign.preview.stage import tokenizer_section

    if not datasets.is_caching_enabled():
        return
    for data, kind in data_sections(recipe)[:1]:
        with suppress(ChatalignError):
            tokenizer = load_tokenizer(tokenizer_section(recipe, stages), chat=data.apply_chat_template)
            prepare(data, tokenizer, kind, seed=recipe.train.seed)
