"""Every file of a real checkpoint, deleted, cut, altered or another run's: named in one line, the one before taken."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatalign import checkpoint, sft
from chatalign.errors import CheckpointError
from chatalign.recipe import validate_stage


def trained(folder: Path, model: Path, seed: int) -> Path:
    """The checkpoints of a finished run of four steps, one at every second."""
    rows = folder.parent / "rows.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "thank you"}]
    rows.write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    raw: dict[str, Any] = {
        "stage": "sft",
        "output_dir": str(folder),
        "model": {"name_or_path": str(model)},
        "lora": {"r": 4},
        "data": {"datasets": [{"path": str(rows)}], "max_length": 32, "packing": False},
        "train": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "seed": seed, "use_cpu": True},
    }
    sft.run(validate_stage(raw, where="test"))
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[Path, Path]:
    """Two runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    return trained(folder / "mine", tiny_model_folder, 1), trained(folder / "theirs", tiny_model_folder, 2)


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


@pytest.mark.parametrize("fault", FAULTS)
def test_every_file_of_a_checkpoint(
    fault: str, runs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs = runs
    run_id = checkpoint.read_manifest(mine / "checkpoint-4")["run_id"]
    files = sorted(
        path.relative_to(mine / "checkpoint-4") for path in (mine / "checkpoint-4").rglob("*") if path.is_file()
    )
    assert {"manifest.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= {str(file) for file in files}
    for file in files:
        place = tmp_path / file.name
        shutil.copytree(mine, place)
        damaged, other = place / "checkpoint-4" / file, theirs / "checkpoint-4" / file
        if fault == "another run's" and other.read_bytes() == damaged.read_bytes():
            continue  # the same state of the same schedule: nothing is wrong with it
        FAULTS[fault](damaged, other)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="chatalign"), pytest.raises(CheckpointError) as named:
            checkpoint.verify(damaged.parent, run_id)
        assert "checkpoint-4" in str(named.value)
        assert "\n" not in str(named.value)
        if isinstance(named.value, checkpoint.OtherRunError):  # the folder is wrong, not one checkpoint in it
            assert (fault, file.name) == ("another run's", "manifest.json")
            continue
        with caplog.at_level(logging.WARNING, logger="chatalign"):
            assert checkpoint.latest_valid(place, run_id) == place / "checkpoint-2"
        assert "checkpoint-4" in caplog.text
        assert "checkpoint before it" in caplog.text
