"""Two processes under torchrun, one of them killed: the launcher ends the other, and both go on bit for bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatalign import checkpoint
from chatalign.artifact import load_artifact
from chatalign.metrics_file import METRICS_FILE, read_metrics
from chatalign.recipe import apply_overrides, read_yaml
from faults.chains import BASE, KILLS, SAVE_EVERY, TRAIN
from faults.killed_chain import ROOT


def launch(folder: Path, kill: dict[str, Any] | None = None) -> int:
    """The stage in two processes of this machine; the launcher's exit code."""
    folder.mkdir(exist_ok=True)
    inputs = {"output_dir": str(folder / "sft"), "model.name_or_path": BASE, "train.use_cpu": True}
    raw = apply_overrides(read_yaml(ROOT / "recipes/pocket/sft.yaml"), TRAIN | inputs)
    (folder / "sft.yaml").write_text(json.dumps(raw))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=static"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(Path(__file__).with_name("killed_rank.py"))]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    return subprocess.run(
        [*command, str(folder / "sft.yaml")],
        cwd=ROOT,
        env=os.environ | settings | {"CHATALIGN_KILL": json.dumps(kill)},
        capture_output=True,
        timeout=300,
        check=False,
    ).returncode


def logged(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "sft" / METRICS_FILE) if "loss" in line]


@pytest.mark.slow
@pytest.mark.skipif(KILLS < 100, reason="`make faults` has it: four launches")
@pytest.mark.timeout(1200)
def test_one_of_two_processes_is_killed(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert launch(whole) == 0
    in_a_save = {"rank": 0, "place": " save 4", "number": 5, "half": True}
    for kill, saved in (({"rank": 1, "place": " train", "number": 4}, 2), (in_a_save, 2)):
        assert launch(resumed, kill) != 0
        run_id = json.loads((resumed / "sft" / "run.json").read_text())["run_id"]
        newest = checkpoint.latest_valid(resumed / "sft" / "checkpoints", run_id)
        assert newest is not None
        assert newest.name == f"checkpoint-{saved}"
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= checkpoint.verify(newest, run_id)["files"].keys()
        assert not (resumed / "sft" / "artifact.json").exists()
        assert logged(resumed)[-1][0] - saved <= SAVE_EVERY
    assert launch(resumed) == 0
    assert load_artifact(resumed / "sft").files == load_artifact(whole / "sft").files
    assert logged(resumed) == logged(whole)
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (resumed, whole)]
    assert names[0] == names[1]
