"""A signal at any moment of a stage: what is saved, what the exit status is, and that it ends bit for bit the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import every_stage
import pytest
import torch
import yaml
from every_stage import make_world, recipe_of, run_cases
from safetensors.torch import load_file
from tiny import make_llama, make_tokenizer
from transformers import Trainer

import chatalign.evaluate.stage
from chatalign import checkpoint, sft
from chatalign.engine.ppo_collect import Collector
from chatalign.engine.signals import STATUS_FILE
from chatalign.engine.stopping import StopWhenAsked
from chatalign.errors import Interrupted, StageStopped
from chatalign.launch import EXIT_INTERRUPTED, stage_main
from chatalign.metrics_file import METRICS_FILE, read_metrics

pytestmark = pytest.mark.slow


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return make_world(folder)


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def status_of(stage: str, module: Any, recipe: Any) -> Any:
    """The exit status of a stage's command."""
    path = Path(f"{recipe.output_dir}.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), "utf-8")
    with pytest.raises(SystemExit) as ended:
        stage_main(stage, module.run, [str(path)])
    return ended.value.code


LOADING = [
    ("sft-lora", sft, sft, "prepare", signal.SIGUSR1),
    ("sft-lora", sft, sft, "load_policy", signal.SIGTERM),
    ("sft-lora", sft, sft, "finish", signal.SIGHUP),
    ("eval", chatalign.evaluate.stage, chatalign.evaluate.stage, "answer", signal.SIGUSR1),
]


@pytest.mark.parametrize(("case", "module", "owner", "name", "number"), LOADING, ids=[row[3] for row in LOADING])
def test_a_signal_before_or_after_training_ends_with_a_line_and_nothing_half_written(
    case: str,
    module: Any,
    owner: Any,
    name: str,
    number: signal.Signals,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = {"models": {"base": {"name_or_path": "base"}}}
    monkeypatch.setitem(every_stage.CASES, "eval", ("eval", models))
    recipe = recipe_of(case, f"loading-{name}", {})
    right = getattr(owner, name)

    def signalled(*arguments: Any, **named: Any) -> Any:
        send(number)
        return right(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        patch.setenv(STATUS_FILE, str(here / "status"))
        assert status_of(recipe.stage, module, recipe) == EXIT_INTERRUPTED
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == f"chatalign: {number.name}: interrupted; the same command goes on"
    assert not (here / "status").exists()  # nothing was saved
    left = {path.name for path in Path(recipe.output_dir).iterdir()}
    assert left <= {"run.json", "recipe.yaml", "checkpoints", METRICS_FILE}
    assert status_of(recipe.stage, module, recipe) == 0


@pytest.mark.parametrize("case", ["sft-full", "sft-trl"])
def test_loader_workers_get_no_signal_that_is_sent_to_the_whole_group(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.endswith("trl") and not find_spec("trl"):
        pytest.skip("needs trl")
    groups: set[int] = set()
    step = Trainer.training_step

    def watched(*arguments: Any, **named: Any) -> Any:
        groups.update(os.getpgid(process.pid or 0) for process in active_children())
        return step(*arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", watched)
    over = {"train": {"dataloader_num_workers": 1, "max_steps": 2, "save_strategy": "no"}}
    run_cases([case], "workers", {case: over})
    assert groups
    assert os.getpgrp() not in groups


ENDLESS = {"train": {"save_strategy": "no", "max_hours": 1.0}}
STOPS = [  # case, cause, where, the step that it is saved at
    ("pretrain-full", "SIGTERM", "step", 3),
    ("sft-full", "SIGINT", "evaluation", 2),
    ("sft-full", "SIGTERM", "last evaluation", 4),
    ("sft-trl", "SIGHUP", "evaluation", 2),
    ("reward-full", "SIGUSR1", "step", 3),
    ("dpo-full", "max_hours", "step", 3),
    ("kto-lora", "SIGUSR1", "step", 3),
    ("ppo-full", "SIGINT", "step", 3),
    ("ppo-full", "SIGTERM", "rollout", 3),
    ("ppo-full", "SIGUSR1", "replies to evaluate", 2),
]
SAME = ("loss", "grad_norm", "learning_rate", "tokens", "eval_loss", "eval_objective/score", "objective/score")


def lines(folder: Path) -> list[dict[str, float]]:
    """What is logged of each step and evaluation, without clocks."""
    read = [
        {name: line[name] for name in ("step", *SAME) if name in line} for line in read_metrics(folder / METRICS_FILE)
    ]
    return [line for line in read if len(line) > 1]


@pytest.fixture(scope="module")
def whole(world: Path) -> Callable[[str], Path]:
    """A case's run that nobody stops, made once."""

    def run(case: str) -> Path:
        if not (world / "whole" / case).exists():
            run_cases([case], "whole", {case: ENDLESS})
        return world / "whole" / case

    return run


def stop_at(where: str, cause: str, patch: pytest.MonkeyPatch) -> None:
    """Have the signal come, or the time be over, in the third step or before."""
    asking: list[StopWhenAsked] = []
    begin = StopWhenAsked.on_train_begin

    def began(self: StopWhenAsked, *arguments: Any, **named: Any) -> None:
        asking.append(self)
        begin(self, *arguments, **named)

    def come() -> None:
        if cause == "max_hours":
            asking[0].began -= 3601.0
        else:
            send(signal.Signals[cause])

    owner, name, when = {
        "step": (Trainer, "training_step", lambda calls: asking[0].trainer.state.global_step == 2),
        "replies to evaluate": (Collector, "collect", lambda calls: calls == 2),  # after a rollout
        "rollout": (Collector, "collect", lambda calls: calls == 3),
        "evaluation": (StopWhenAsked, "on_prediction_step", lambda calls: calls == 2),
        "last evaluation": (StopWhenAsked, "on_evaluate", lambda calls: calls == 2),
    }[where]
    right = getattr(owner, name)
    calls = 0

    def stopped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if when(calls):
            come()
        return right(*arguments, **named)

    patch.setattr(StopWhenAsked, "on_train_begin", began)
    patch.setattr(owner, name, stopped)


@pytest.mark.parametrize(("case", "cause", "where", "step"), STOPS)
def test_every_stage_goes_on_bit_for_bit_the_same(
    case: str,
    cause: str,
    where: str,
    step: int,
    here: Path,
    whole: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if ("trl" in case or "kto" in case) and not find_spec("trl"):
        pytest.skip("needs trl")
    expected, folder = whole(case), here / f"{cause}-{where}" / case
    with monkeypatch.context() as patch:
        stop_at(where, cause, patch)
        patch.setenv(STATUS_FILE, str(here / "status"))
        with pytest.raises(Interrupted, match=rf"{cause}.*: saved at step {step} of 4 ") as stopped:
            run_cases([case], f"{cause}-{where}", {case: ENDLESS})
    assert isinstance(stopped.value, StageStopped) == (cause == "max_hours")
    assert int((here / "status").read_text()) == EXIT_INTERRUPTED
    (here / "status").unlink()
    assert [path.name for path in checkpoint.list_checkpoints(folder / "checkpoints")] == [f"checkpoint-{step}"]
    assert not (folder / "artifact.json").exists()
    if where == "evaluation":  # cut short
        assert not any("eval_loss" in line for line in lines(folder))
    run_cases([case], f"{cause}-{where}", {case: ENDLESS})
    assert lines(folder) == lines(expected)
    files = sorted((expected / "model").glob("*.safetensors"))
    assert files
    for file in files:
        found = load_file(folder / "model" / file.name)
        for name, values in load_file(file).items():
            assert torch.equal(found[name], values), name
