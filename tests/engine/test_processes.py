"""Two processes over gloo are one with twice the batch, and ``accelerate launch -m`` runs a stage as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
_BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def sft_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["hello", "world", "Paris", "thank you", "capital"]
    rows = [
        {"messages": [{"role": "user", "content": f"{a} {b}?"}, {"role": "assistant", "content": f"{b}. " * (1 + i)}]}
        for i, a in enumerate(words)
        for b in words
    ]
    path = tmp_path_factory.mktemp("rows") / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_recipe(folder: Path, name: str, rows: Path, model: Path, batch_size: int) -> Path:
    recipe = {
        "stage": "sft",
        "output_dir": str(folder / name),
        "model": {"name_or_path": str(model)},
        "data": {"datasets": [{"path": str(rows)}], "max_length": 64, "packing": False, "eval_fraction": 0.2},
        "train": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 2,
            "num_train_epochs": 2,
            "eval_strategy": "epoch",
            "logging_steps": 1,
            "save_steps": 3,
            "use_cpu": True,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def launch(*command: str | Path) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def logged(folder: Path) -> list[dict[str, float]]:
    kept = ("step", "loss", "eval_loss", "grad_norm", "tokens")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: line[name] for name in kept if name in line} for line in lines if {"loss", "eval_loss"} & line.keys()
    ]


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, sft_file: Path, tiny_model_folder: Path) -> None:
    one = write_recipe(tmp_path, "one", sft_file, tiny_model_folder, 4)
    two = write_recipe(tmp_path, "two", sft_file, tiny_model_folder, 2)
    launch(_BIN / "accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "chatalign.sft", one)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531"]
    launch(*torchrun, "-m", "chatalign.sft", two)
    for alone, together in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert together == pytest.approx(alone, rel=1e-4)
    expected = load_file(tmp_path / "one" / "model" / "model.safetensors")
    found = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-5, rtol=1e-5)
    artifacts = [json.loads((tmp_path / name / "artifact.json").read_text()) for name in ("one", "two")]
    assert artifacts[0]["tokens_seen"] == artifacts[1]["tokens_seen"] > 0
