"""Two processes with two rows each are one with four: every stage, full and LoRA, held step by step to 1e-5."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launched
import pytest
import torch
from engine.test_processes import free_port, launch
from launched import FAULTS
from same_steps import LORA, NATIVE, Line, assert_same_steps, logged, recipe_of, run, write_rows
from tiny import make_llama

pytestmark = pytest.mark.slow
WAYS = {"full": {}, "lora": {"lora": LORA}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def rows(place: Path) -> Path:
    (place / "rows").mkdir()
    return write_rows(place / "rows")


Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def recipe(place: Path, rows: Path, tiny_tokenizer: Any, tiny_model_folder: Path) -> Recipe:
    """`recipe(stage, way, folder, **train)`; PPO's replies end now and then, so that processes differ in tokens."""
    llama = make_llama(len(tiny_tokenizer))
    with torch.no_grad():
        llama.lm_head.weight[tiny_tokenizer.eos_token_id] *= 30
    llama.save_pretrained(place / "model")
    tiny_tokenizer.save_pretrained(place / "model")

    def made(stage: str, way: str, folder: Path, **train: Any) -> dict[str, Any]:
        is_ppo = stage == "ppo"  # whose steps would be wild at the others' rate, from such a model
        over = WAYS[way] | {"train": train | ({"learning_rate": 0.01} if is_ppo else {})}
        model = place / "model" if is_ppo else tiny_model_folder
        return recipe_of(stage, over, folder=folder, rows=rows, model=model)

    return made


@pytest.fixture(scope="module")
def two(place: Path, recipe: Recipe) -> Path:
    """The runs of two processes, all in one launch; `two / NAME` is a run's folder."""
    folder = place / "two"
    runs = [(stage, way, f"{stage}-{way}", None) for stage in NATIVE for way in WAYS]
    runs += [(fault.split(", ")[1], "full", fault, fault) for fault in FAULTS]
    plan = [
        {"recipe": recipe(stage, way, folder / name, per_device_train_batch_size=2), "fault": fault}
        for stage, way, name, fault in runs
    ]
    path = place / "plan.json"
    path.write_text(json.dumps(plan), "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    launch(*torchrun, launched.__file__, path)
    return folder


def alone(recipe: Recipe, stage: str, way: str, place: Path) -> list[Line]:
    """What one process logs at each step; made once."""
    folder = place / "one" / f"{stage}-{way}"
    return logged(folder) if folder.is_dir() else run(recipe(stage, way, folder))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", NATIVE)
def test_processes(stage: str, way: str, two: Path, place: Path, recipe: Recipe) -> None:
    ours, theirs = logged(two / f"{stage}-{way}"), alone(recipe, stage, way, place)
    assert_same_steps(ours, theirs)
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    if stage == "ppo":
        assert 2 < theirs[0]["reply/length"] < 8


# These comparisons can fail


@pytest.mark.parametrize(
    ("fault", "words"),
    [("own mean, sft", "loss: "), ("own mean, ppo", "loss: "), ("heavier, reward", "lean to one side")],
)
def test_a_wrong_divisor_is_found(fault: str, words: str, two: Path, place: Path, recipe: Recipe) -> None:
    theirs = alone(recipe, fault.split(", ")[1], "full", place)
    with pytest.raises(AssertionError, match=words):
        assert_same_steps(logged(two / fault), theirs)
