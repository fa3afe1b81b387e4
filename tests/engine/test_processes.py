"""Two processes over gloo are one with twice the batch, and ``accelerate launch -m`` runs a stage as it is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chatalign import dpo, reward
from chatalign.recipe import load_recipe

pytestmark = pytest.mark.slow
_WORDS = ["hello", "world", "Paris", "thank you", "capital"]
# Runs each recipe in turn; the last one is stopped four times before: by a signal to the last process alone, by two
# signals at different moments, in the middle of an evaluation, and by the clock of one process.
_SCRIPT = """
import os, signal, sys
from importlib import import_module
import torch.distributed
from chatalign.engine import stopping
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.errors import Interrupted
from chatalign.recipe import load_recipe

RANK = int(os.environ["RANK"])
right = {name: getattr(LmTrainer, name) for name in ("objective", "_save_checkpoint")}

def run(path):
    recipe = load_recipe(path)
    import_module(f"chatalign.{recipe.stage}").run(recipe)

def stopped(path, said, objective=lambda self: None, save=lambda self: None):
    sent = []
    def once(number):
        if number and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
    def watched_objective(self, *arguments):
        once(objective(self))
        return right["objective"](self, *arguments)
    def watched_save(self, *arguments):
        once(save(self))
        return right["_save_checkpoint"](self, *arguments)
    LmTrainer.objective, LmTrainer._save_checkpoint = watched_objective, watched_save
    try:
        run(path)
    except Interrupted as error:
        assert said in str(error), error
    else:
        raise SystemExit("not interrupted")
    LmTrainer.objective, LmTrainer._save_checkpoint = right.values()

def spend_time(self):
    if RANK == 1 and self.state.global_step == 5 and self.model.training:
        self.stop.began -= 3601

for path in sys.argv[1:-1]:
    run(path)
class BesideNccl:
    def __getattr__(self, name):
        return getattr(torch.distributed, name)
    def get_backend(self):
        return "nccl"

stopping.dist = BesideNccl()  # then processes agree in a group of their own
last = sys.argv[-1]
stopped(last, "SIGUSR1: saved at step 3", lambda self: RANK == 1 and self.state.global_step == 2 and signal.SIGUSR1)
stopped(
    last,
    "SIGTERM: saved at step 4",
    lambda self: RANK == 0 and signal.SIGTERM,
    lambda self: RANK == 1 and signal.SIGINT,
)
stopped(last, "SIGTERM: saved at step 5", lambda self: RANK == 1 and not self.model.training and signal.SIGTERM)
stopped(last, "1` are over: saved at step 6", spend_time)
run(last)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    both = [(a, b) for a in _WORDS for b in _WORDS]
    chats = [{"prompt": f"{a} {b}?", "completion": f"{b}. " * (1 + len(a) % 3)} for a, b in both]
    pairs = [{"prompt": f"{a} {b}?", "chosen": f"{b}.", "rejected": f"{a} no"} for a, b in both]
    for name, content in (("sft", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    return folder


def write_recipe(
    folder: Path,
    name: str,
    rows: Path,
    model: Path,
    *,
    batch_size: int,
    max_hours: float | None = None,
    **sections: Any,
) -> Path:
    stage = name.partition("-")[0]
    recipe = {
        "stage": stage,
        "output_dir": str(folder / name),
        "model": {"name_or_path": str(model)},
        "data": {
            "datasets": [{"path": str(rows / ("sft.jsonl" if stage == "sft" else "pairs.jsonl"))}],
            "max_length": 64,
            "packing": False,
            "eval_fraction": 0.2,
        },
        "train": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 2,
            "num_train_epochs": 2,
            "eval_strategy": "epoch",
            "logging_steps": 1,
            "max_hours": max_hours,
            "use_cpu": True,
        },
        **sections,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def launch(*command: str | Path) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def assert_same_run(one: Path, two: Path) -> None:
    for alone, together in zip(logged(one), logged(two), strict=True):
        assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)
    expected = load_file(one / "model" / "model.safetensors")
    found = load_file(two / "model" / "model.safetensors")
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-5, rtol=1e-5)
    artifacts = [json.loads((folder / "artifact.json").read_text()) for folder in (one, two)]
    assert artifacts[0]["tokens_seen"] == artifacts[1]["tokens_seen"] > 0
    scales = [artifact["extra"].get("normaliser", {}) for artifact in artifacts]
    assert scales[1] == pytest.approx(scales[0], rel=1e-3)


def logged(folder: Path) -> list[dict[str, float]]:
    dropped = ("time_s", "tokens_per_s", "eval_runtime")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in dropped}
        for line in lines
        if {"loss", "eval_loss"} & line.keys()
    ]


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, rows: Path, tiny_model_folder: Path) -> None:
    precomputed = {"dpo": {"precompute_ref_log_probs": True}}
    ones = {
        "sft": write_recipe(tmp_path, "sft-one", rows, tiny_model_folder, batch_size=4),
        "reward": write_recipe(tmp_path, "reward-one", rows, tiny_model_folder, batch_size=4),
        "dpo": write_recipe(tmp_path, "dpo-one", rows, tiny_model_folder, batch_size=4, **precomputed),
    }
    twos = [
        write_recipe(tmp_path, "sft-two", rows, tiny_model_folder, batch_size=2),
        write_recipe(tmp_path, "reward-two", rows, tiny_model_folder, batch_size=2),
        write_recipe(tmp_path, "dpo-two", rows, tiny_model_folder, batch_size=2, **precomputed),
        write_recipe(tmp_path, "sft-stopped", rows, tiny_model_folder, batch_size=2, max_hours=1),
    ]
    script = tmp_path / "stages.py"
    script.write_text(_SCRIPT, "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    launch(*torchrun, script, *twos)
    accelerate = [Path(sys.executable).parent / "accelerate", "launch", "--cpu", "--num_processes", "1"]
    launch(*accelerate, "-m", "chatalign.sft", ones["sft"])
    reward.run(load_recipe(ones["reward"]))
    dpo.run(load_recipe(ones["dpo"]))
    for stage in ones:
        assert_same_run(tmp_path / f"{stage}-one", tmp_path / f"{stage}-two")
    assert_same_run(tmp_path / "sft-one", tmp_path / "sft-stopped")
