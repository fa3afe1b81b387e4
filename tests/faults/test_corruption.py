"""Every file of a real checkpoint or model, deleted, cut, altered or another run's: named in a line, never used."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatalign import checkpoint, ppo, sft
from chatalign.artifact import load_artifact
from chatalign.engine.ppo_state import LISTS_FILE, TENSORS_FILE
from chatalign.errors import ChatalignError, CheckpointError
from chatalign.recipe import validate_stage
from chatalign.verify import verify_run

ROWS = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "thank you"}]}
REWARD = "def length(*, prompts, replies, extras):\n    return [float(len(reply)) for reply in replies]\n"
ALL = {"manifest.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", "trainable.safetensors"}
KINDS: dict[str, set[str]] = {  # what else a checkpoint of each kind holds
    "sft": {"rng_state.pth"},
    "ppo": {"rng_state.pth", TENSORS_FILE, LISTS_FILE},  # in the middle of a rollout
    "two processes": {"rng_state_0.pth", "rng_state_1.pth"},
}


def recipe_of(folder: Path, model: Path, seed: int) -> dict[str, Any]:
    rows = folder.parent / "rows.jsonl"
    rows.write_text(f"{json.dumps(ROWS)}\n" * 8)
    return {
        "stage": "sft",
        "output_dir": str(folder),
        "model": {"name_or_path": str(model)},
        "lora": {"r": 4},
        "data": {"datasets": [{"path": str(rows)}], "max_length": 32, "packing": False},
        "train": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "seed": seed, "use_cpu": True},
    }


def trained(folder: Path, model: Path, seed: int) -> Path:
    """A finished run of four steps, with a checkpoint at every second."""
    sft.run(validate_stage(recipe_of(folder, model, seed), where="test"))
    return folder


def trained_by_ppo(folder: Path, model: Path, seed: int) -> Path:
    """A run of two rollouts of two steps that was cut off in the second one."""
    raw = recipe_of(folder, model, seed)
    (folder.parent / "reward.py").write_text(REWARD)
    (folder.parent / "prompts.jsonl").write_text(f"{json.dumps({'prompt': 'hello'})}\n" * 8)
    raw |= {"stage": "ppo", "data": {"datasets": [{"path": str(folder.parent / "prompts.jsonl")}]}}
    raw["ppo"] = {"total_episodes": 8, "rollout_batch_size": 4, "num_mini_batches": 2, "num_ppo_epochs": 1}
    raw["ppo"] |= {"response_length": 4, "rewards": [{"function": f"{folder.parent / 'reward.py'}:length"}]}
    raw["train"] = {"save_steps": 1, "save_total_limit": None, "per_device_train_batch_size": 2}
    raw["train"] |= {"seed": seed, "use_cpu": True}
    ppo.run(validate_stage(raw, where="test"))
    for step in (2, 4):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
    return folder


def as_of_two_processes(run: Path, folder: Path) -> Path:
    """The run's checkpoints with a random state for each of two processes, as they write them, sealed again."""
    shutil.copytree(run, folder)
    for made in checkpoint.list_checkpoints(folder / "checkpoints"):
        manifest = checkpoint.read_manifest(made)
        shutil.copyfile(made / "rng_state.pth", made / "rng_state_0.pth")
        (made / "rng_state.pth").rename(made / "rng_state_1.pth")
        checkpoint.write_manifest(made, manifest["run_id"], manifest["extra"])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, tuple[Path, Path]]:
    """Of each kind two runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for kind, make in (("sft", trained), ("ppo", trained_by_ppo)):
        found[kind] = make(folder / f"{kind}1", tiny_model_folder, 1), make(folder / f"{kind}2", tiny_model_folder, 2)
    mine, theirs = found["sft"]
    found["two processes"] = as_of_two_processes(mine, folder / "1"), as_of_two_processes(theirs, folder / "2")
    return found


def cut(file: Path, theirs: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path, theirs: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FAULTS: dict[str, Callable[[Path, Path], Any]] = {
    "deleted": lambda file, theirs: file.unlink(),
    "emptied": lambda file, theirs: file.write_bytes(b""),
    "cut": cut,
    "a bit flipped": flip,
    "another run's": lambda file, theirs: shutil.copyfile(theirs, file),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_file_of_a_checkpoint(
    fault: str, kind: str, runs: dict[str, tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs = (run / "checkpoints" for run in runs[kind])
    before, newest = (path.name for path in checkpoint.list_checkpoints(mine))
    run_id = checkpoint.read_manifest(mine / newest)["run_id"]
    files = sorted(path.relative_to(mine / newest) for path in (mine / newest).rglob("*") if path.is_file())
    assert ALL | KINDS[kind] <= {str(file) for file in files}
    for file in files:
        place = tmp_path / file.name
        shutil.copytree(mine, place)
        damaged, other = place / newest / file, theirs / newest / file
        if fault == "another run's" and other.read_bytes() == damaged.read_bytes():
            continue  # the same state of the same schedule: nothing is wrong with it
        FAULTS[fault](damaged, other)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="chatalign"), pytest.raises(CheckpointError) as named:
            checkpoint.verify(damaged.parent, run_id)
        assert newest in str(named.value)
        assert "\n" not in str(named.value)
        if isinstance(named.value, checkpoint.OtherRunError):  # the folder is wrong, not one checkpoint in it
            assert (fault, file.name) == ("another run's", checkpoint.MANIFEST)
            continue
        with caplog.at_level(logging.WARNING, logger="chatalign"):
            assert checkpoint.latest_valid(place, run_id) == place / before
        assert newest in caplog.text
        assert "checkpoint before it" in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
def test_no_stage_starts_from_a_damaged_model(fault: str, runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Every file of a finished model; of generation_config.json the stops alone count for training."""
    mine, theirs = runs["sft"]
    files = [file for file in load_artifact(mine).files if not file.endswith("generation_config.json")]
    assert {"model/adapter_model.safetensors", "model/adapter_config.json", "model/tokenizer.json"} <= set(files)
    for file in files:
        parent, child = tmp_path / Path(file).name, tmp_path / f"on {Path(file).name}"
        shutil.copytree(mine, parent)
        if fault == "another run's" and (theirs / file).read_bytes() == (mine / file).read_bytes():
            continue
        FAULTS[fault](parent / file, theirs / file)
        assert any(Path(file).name in (verdict.problem or "") for verdict in verify_run(parent))
        with pytest.raises(ChatalignError) as named:
            sft.run(validate_stage(recipe_of(child, parent, 1), where="test"))
        assert str(parent) in str(named.value)
        assert "\n" not in str(named.value)
        assert not (child / "metrics.jsonl").exists()
