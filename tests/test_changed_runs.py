"""Real runs that were killed and are asked for otherwise, by the command: refused, or gone on with by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from chatalign import launch, sft
from chatalign.artifact import load_artifact, sha256_weights
from chatalign.checkpoint import read_manifest
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.metrics_file import METRICS_FILE, read_metrics
from chatalign.unfinished import read_run_file


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder with ``sft.yaml`` and its LoRA run, killed after the checkpoint of step 2 of 4."""
    place = tmp_path_factory.mktemp("killed")
    rows = [{"prompt": f"{i} + 2", "completion": f"the answer is {i}!"} for i in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    train = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1}
    raw = {
        "stage": "sft",
        "output_dir": "run",
        "model": {"name_or_path": str(tiny_model_folder)},
        "lora": {"r": 4},
        "data": {"datasets": [{"path": "rows.jsonl"}], "packing": False},
        "train": train | {"warmup_steps": 0, "lr_scheduler_type": "constant", "use_cpu": True},
    }
    (place / "sft.yaml").write_text(yaml.safe_dump(raw), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert command("sft.yaml") == 0
    for left in ("model", "plots", "checkpoints/checkpoint-4"):
        shutil.rmtree(place / "run" / left)
    for left in ("artifact.json", "report.md"):
        (place / "run" / left).unlink()
    return place


@pytest.fixture
def here(killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the killed run, the working directory."""
    shutil.copytree(killed, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def command(*words: str) -> int:
    """The exit status of ``python -m chatalign.sft``."""
    with pytest.raises(SystemExit) as ended:
        launch.stage_main("sft", sft.run, words)
    return int(ended.value.code or 0)


def rates(place: Path) -> dict[int, float]:
    lines = read_metrics(place / "run" / METRICS_FILE)
    return {line["step"]: line["learning_rate"] for line in lines if "loss" in line}


def test_a_change_is_refused_before_a_model_loads_and_taken_up_by_name(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sft.yaml", "train.learning_rate=1e-2", "train.max_steps=6")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "load_policy", lambda *_: pytest.fail("a model was loaded"))
        assert command(*words) == 2
        assert command(*words, "--allow-change", "train.learning_rate") == 2
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith("chatalign: "))
    assert "run: train.learning_rate: 0.001 → 0.01 and 1 more, since its unfinished run (checkpoint-2)" in first
    assert "run: train.max_steps: -1 → 6, since" in second
    run_id = read_run_file(here / "run")["run_id"]
    assert command(*words, "--allow-change", "train") == 0
    said = capsys.readouterr().out
    assert "run: goes on from checkpoint-2 with train.learning_rate: 0.001 → 0.01, train.max_steps: -1 → 6" in said
    artifact = load_artifact("run")
    assert (artifact.run_id, artifact.fingerprint) == (run_id, read_run_file(here / "run")["fingerprint"])
    assert [(change["key"], change["step"]) for change in artifact.extra["changes"]] == [
        ("train.learning_rate", 2),
        ("train.max_steps", 2),
    ]
    rates = {
        line["step"]: line["learning_rate"] for line in read_metrics(here / "run" / METRICS_FILE) if "loss" in line
    }
    assert rates == {1: 1e-3, 2: 1e-3} | dict.fromkeys(range(3, 7), 1e-2)
    assert "| `train.learning_rate` | 0.001 | 0.01 | 2 |" in (here / "run" / "report.md").read_text("utf-8")
    manifest = read_manifest(here / "run" / "checkpoints" / "checkpoint-6")
    assert manifest["fingerprint"] == artifact.fingerprint
    assert manifest["data"] == {"rows.jsonl": artifact.data[0].sha256}
    assert artifact.base_model is not None
    assert manifest["base_model"] == artifact.base_model.model_dump() | {"revision": None}
    assert yaml.safe_load((here / "run" / "recipe.yaml").read_text("utf-8")) == artifact.recipe
    assert command(*words, "--allow-change", "train") == 0  # the same command again: finished


@pytest.mark.parametrize("killed_in", ["load_policy", "train", "a step"])
def test_after_a_kill_the_plain_command_goes_on_with_the_change(
    killed_in: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sft.yaml", "train.learning_rate=1e-2")

    def kill(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((LmTrainer, "compute_loss") if killed_in == "a step" else (sft, killed_in)), kill)
        assert command(*words, "--allow-change=train.learning_rate") == 130
    assert ("changes" in read_run_file(here / "run")) == (killed_in == "a step")  # with the checkpoint loaded
    assert command(*words) == 0
    assert rates(here)[3] == rates(here)[4] == 1e-2
    changes = load_artifact("run").extra["changes"]
    assert [(change["key"], change["step"]) for change in changes] == [("train.learning_rate", 2)]


def test_other_rows_go_on_where_the_order_holds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (here / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    (here / "rows.jsonl").write_text("".join([*rows, rows[0].replace("0 + 2", "9 + 2")]), "utf-8")
    assert command("sft.yaml", "--allow-change", "data") == 2
    assert "the rows that follow are not those that the run has yet to see" in capsys.readouterr().err
    (here / "rows.jsonl").write_text("".join(rows), "utf-8")
    assert command("sft.yaml") == 0  # nothing was changed in the run by that
    assert "changes" not in load_artifact("run").extra


def test_an_adapter_goes_on_with_another_scale_on_another_base(
    here: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are the checkpoint's: without a step to go they are those that were saved there."""
    shutil.copytree(tiny_model_folder, here / "base")
    recipe = yaml.safe_load((here / "sft.yaml").read_text("utf-8"))
    (here / "sft.yaml").write_text(yaml.safe_dump(recipe | {"model": {"name_or_path": "base"}}), "utf-8")
    weights = load_file(here / "base" / "model.safetensors")
    weights["model.norm.weight"] = 2 * weights["model.norm.weight"]
    save_file(weights, here / "base" / "model.safetensors", metadata={"format": "pt"})
    words = ("sft.yaml", "lora.lora_alpha=64", "train.max_steps=2")
    assert command(*words, "--allow-change", "model.name_or_path,lora,train") == 2  # the weights are others, too
    assert command(*words, "--allow-change", "model,lora,train") == 0
    artifact = load_artifact("run")
    assert {change["key"] for change in artifact.extra["changes"]} == {
        "model.name_or_path",
        "model.weights",
        "lora.lora_alpha",
        "train.max_steps",
    }
    assert artifact.base_model is not None
    assert artifact.base_model.sha256 == sha256_weights(here / "base")
    assert json.loads((here / "run" / "model" / "adapter_config.json").read_text("utf-8"))["lora_alpha"] == 64
    saved = load_file(here / "run" / "checkpoints" / "checkpoint-2" / "trainable.safetensors")
    adapter = load_file(here / "run" / "model" / "adapter_model.safetensors")
    assert len(saved) == len(adapter) > 0
    assert all(torch.equal(adapter[name.replace(".default", "")], values) for name, values in saved.items())
