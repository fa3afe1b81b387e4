"""What a run says while it trains: ``metrics.jsonl`` always, a progress bar, and wandb, tensorboard or trackio on wish.

``metrics.jsonl`` holds one JSON object a line: ``step``, ``epoch``, ``time_s`` (seconds of training, summed over
resumes) and everything that was logged at that step. Trackers run through transformers' own integrations.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from chatalign.artifact import write_whole
from chatalign.errors import DependencyError
from chatalign.metrics_file import METRICS_FILE, encode_line, read_metrics
from chatalign.recipe import EvalRecipe, StageRecipe
from chatalign.runs import Run, is_main_process

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}
# What a stage is watched by, beside the bar and after the loss.
KEY_METRICS: dict[str, tuple[str, ...]] = {
    "reward": ("accuracy",),
    "dpo": ("rewards/accuracies",),
    "kto": ("rewards/margins",),
    "ppo": ("objective/score", "objective/kl"),
}
_log = logging.getLogger("chatalign")
_PLAIN_LINE_EVERY_S = 60.0  # where there is no terminal: each tenth of the steps, and at least this often


def report_to(recipe: StageRecipe | EvalRecipe) -> list[str]:
    """``TrainingArguments.report_to`` for a recipe: the tracker's name in transformers, or none.

    Raises DependencyError where the tracker's package isn't installed. Tensorboard's files go to
    ``output_dir/tensorboard``, which transformers takes from the environment alone.
    """
    if recipe.tracking == "none":
        return []
    if find_spec(PACKAGES[recipe.tracking]) is None:
        raise DependencyError(
            f"`tracking: {recipe.tracking}` needs a package that isn't installed; {_install(recipe.tracking)}, "
            "or set `tracking: none`"
        )
    if recipe.tracking == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(recipe.output_dir) / "tensorboard")
    return [recipe.tracking]


def _install(tracker: str) -> str:
    extra = f'"chatalign[{tracker}]"' if tracker in ("wandb", "tensorboard") else tracker
    return f"pip install {extra}"


def callbacks(recipe: StageRecipe, run: Run) -> list[TrainerCallback]:
    """The callbacks of every stage: the metrics file and the progress bar; opens the wandb run where one is wanted.

    Pass them to :func:`attach`, or to the trainer's ``callbacks`` after removing transformers' own printing ones.
    """
    report_to(recipe)
    if recipe.tracking == "wandb" and is_main_process():
        open_wandb(recipe, run)
    return [MetricsFile(run.folder / METRICS_FILE), ProgressBar(recipe.stage)]


def attach(trainer: Trainer, recipe: StageRecipe, run: Run) -> None:
    """Put :func:`callbacks` in the place of transformers' progress bar and printer."""
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    for callback in callbacks(recipe, run):
        trainer.add_callback(callback)


def open_wandb(recipe: StageRecipe | EvalRecipe, run: Run) -> Any:
    """Start the wandb run that transformers' callback will log to, its files under the run folder.

    A run that an earlier stage of the same process left open is finished first: transformers would go on in it.
    """
    import wandb

    if wandb.run is not None:
        wandb.finish()
    settings: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "chatalign"),
        "name": getattr(recipe, "run_name", None) or run.folder.name,
        "id": run.run_id,
        "dir": run.folder,
        "config": recipe.model_dump(mode="json"),
    }
    try:
        return wandb.init(resume="allow", **settings)
    except wandb.errors.CommError as error:
        _log.warning(
            "tracking: wandb can't be reached (%s); logging to %s, `wandb sync` sends it later",
            " ".join(str(error).split())[:120],
            run.folder / "wandb",
        )
        return wandb.init(mode="offline", **settings)


def log_results(recipe: EvalRecipe, run: Run, metrics: Mapping[str, float]) -> None:
    """Send a finished evaluation's numbers to the recipe's tracker, as one step."""
    if not report_to(recipe) or not is_main_process():
        return
    if recipe.tracking == "wandb":
        with open_wandb(recipe, run) as tracked:
            tracked.log(dict(metrics))
    elif recipe.tracking == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(log_dir=os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, 0)
    else:
        import trackio

        trackio.init(project="chatalign", name=run.folder.name)
        trackio.log(dict(metrics))
        trackio.finish()


class MetricsFile(TrainerCallback):
    """Writes ``metrics.jsonl``, each line flushed; a resumed run goes on after the step that it resumes from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._started = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what a killed run logged beyond the checkpoint, and go on counting time from there.

        Beyond it is the evaluation at its step too, where that is owed and so made (again) now.
        """
        if not state.is_world_process_zero:
            return
        self._close()
        logged = [line for line in read_metrics(self.path) if 0 < state.global_step >= line["step"]]
        again = state.global_step if args.eval_on_start else None
        kept = [line for line in logged if line["step"] != again or not any(name.startswith("eval_") for name in line)]
        write_whole(self.path, "".join(map(encode_line, kept)))
        spent = max((line.get("time_s") or 0.0 for line in kept), default=0.0)
        self._started = time.perf_counter() - spent
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - held open while training runs

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """One line for what was logged at this step."""
        if not state.is_world_process_zero or logs is None:
            return
        if self._file is None:  # logged outside training, such as an evaluation after it
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        elapsed = round(time.perf_counter() - self._started, 3)
        self._file.write(encode_line({"step": state.global_step, "epoch": state.epoch, "time_s": elapsed, **logs}))
        self._file.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the file; later logs open it again."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class ProgressBar(TrainerCallback):
    """Stage, steps, loss, key metric, tokens a second and time left: a bar, or sparse lines without a terminal."""

    def __init__(self, stage: str, console: Console | None = None) -> None:
        self.stage = stage
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._shown = ""
        self._started, self._first_step = time.perf_counter(), 0
        self._last_line, self._last_tenth = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar at the step where training starts or goes on."""
        if not state.is_world_process_zero:
            return
        self._started, self._first_step = time.perf_counter(), state.global_step
        self._last_line, self._last_tenth = self._started, self._tenth(state)
        if self.console.is_terminal:
            self._bar = progress_bar(self.console)
            self._task = self._bar.add_task(self.stage, total=state.max_steps, completed=state.global_step, note="")
            self._bar.start()
            atexit.register(self._bar.stop)  # a run that dies on an error must not leave the cursor hidden

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the newest numbers."""
        if not state.is_world_process_zero or logs is None:
            return
        self._shown = summary_of(self.stage, logs) or self._shown
        if self._bar is not None:
            self._bar.update(self._task, note=self._shown)
        elif not self.console.is_terminal:
            self._line(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the finished bar standing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
            self._bar.stop()
            atexit.unregister(self._bar.stop)
            self._bar = None

    def _tenth(self, state: TrainerState) -> int:
        return 10 * state.global_step // max(state.max_steps, 1)

    def _line(self, state: TrainerState) -> None:
        now, tenth = time.perf_counter(), self._tenth(state)
        if tenth <= self._last_tenth and now - self._last_line < _PLAIN_LINE_EVERY_S:
            return
        self._last_line, self._last_tenth = now, tenth
        done = state.global_step - self._first_step
        left = (now - self._started) / done * (state.max_steps - state.global_step) if done else 0.0
        parts = [f"{self.stage} {state.global_step}/{state.max_steps}", self._shown, f"{clock(left)} left"]
        self.console.print(" · ".join(part for part in parts if part), highlight=False, markup=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A rich progress bar in the house's look; tasks carry a ``note`` field."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
    )


@contextmanager
def working(title: str, total: int, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Show progress outside training: a bar in a terminal, else one line at the end. Yields ``step(n)``."""
    console = console or Console(stderr=True)
    started, done = time.perf_counter(), 0
    bar = progress_bar(console) if console.is_terminal else None
    task = bar.add_task(title, total=total, note="") if bar else None

    def step(n: int) -> None:
        nonlocal done
        done += n
        if bar is not None and task is not None:
            bar.update(task, completed=done)

    if bar is not None:
        with bar:
            yield step
        return
    yield step
    seconds = time.perf_counter() - started
    console.print(f"{title} {done}/{total} · {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)


def summary_of(stage: str, logs: Mapping[str, Any]) -> str:
    """The numbers worth a glance among `logs`: loss, the stage's key metric, tokens a second; may be empty."""
    parts = []
    if isinstance(loss := logs.get("loss"), int | float):
        parts.append(f"loss {loss:.4f}")
    for name in KEY_METRICS.get(stage, ()):
        if isinstance(value := logs.get(name), int | float):
            parts.append(f"{name.rpartition('/')[2]} {value:.3f}")
    if isinstance(speed := logs.get("tokens_per_s"), int | float):
        parts.append(f"{speed:,.0f} tok/s")
    return " · ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
