"""What a power cut must find: each file on the disk before the name that vouches for it, and the names after it.

A disk may bring a rename to its plates before the contents, unless it was told to sync. So at each rename that puts
something in place, and before something older is deleted, no file or folder of it may have changed since its sync.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from chatalign import checkpoint, sft
from chatalign.artifact import ARTIFACT_FILE
from chatalign.recipe import validate_stage
from chatalign.runs import CHECKPOINTS, RUN_FILE


class Disk:
    """Knows when each file and folder was last synced, by its inode, which a rename keeps."""

    def __init__(self) -> None:
        self.synced: dict[int, int] = {}
        self.put: list[str] = []  # what was put in place, in order

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note what is synced, and look at each rename and removal."""
        self._before(monkeypatch, os, "replace", self._replaced)
        self._before(monkeypatch, shutil, "rmtree", self._removed)
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self.synced[os.fstat(descriptor).st_ino] = time.time_ns()

        monkeypatch.setattr(os, "fsync", synced)

    def _before(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, look: Callable[..., None]) -> None:
        right = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            look(*args)
            return right(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def _replaced(self, source: Path, target: Path) -> None:
        self.put.append(Path(target).name)
        if not Path(source).name.startswith(".sft.new-"):  # recipe.yaml is for people
            assert self.unsynced(source) == [], f"renamed to {target}"
        if Path(target).name == ARTIFACT_FILE:
            assert self.unsynced(Path(target).parent / "model") == []

    def _removed(self, folder: Path, *_: Any) -> None:
        if Path(folder).name.startswith("checkpoint-"):
            others = [other for other in checkpoint.list_checkpoints(Path(folder).parent) if other != Path(folder)]
            assert others, "the last one goes"
            assert self.unsynced(others[-1]) == []
            assert not self._changed(Path(folder).parent), "its successor's name may not be on the disk"

    def unsynced(self, place: Path | str) -> list[str]:
        """What lies at or below a place and changed since its last sync."""
        place = Path(place)
        return [str(path) for path in (place, *place.rglob("*")) if self._changed(path)]

    def _changed(self, path: Path) -> bool:
        found = path.stat()
        return found.st_mtime_ns > self.synced.get(found.st_ino, 0)


def test_nothing_is_named_before_it_is_on_the_disk(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "thank you"}]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    raw: dict[str, Any] = {
        "stage": "sft",
        "output_dir": str(tmp_path / "sft"),
        "model": {"name_or_path": str(tiny_model_folder)},
        "data": {"datasets": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 32, "packing": False},
        "train": {"max_steps": 3, "save_steps": 1, "save_total_limit": 1, "use_cpu": True},
    }
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    disk = Disk()
    disk.watch(monkeypatch)
    sft.run(validate_stage(raw, where="test"))
    order = [name for name in disk.put if name not in ("metrics.jsonl", "record.json", "made_from.json")]
    assert order[:2] == [RUN_FILE, "sft"]
    saves = [name for step in (1, 2, 3) for name in ("manifest.json", f"checkpoint-{step}", checkpoint.LATEST)]
    assert [name for name in order if name in saves] == saves
    assert order[-1] == ARTIFACT_FILE
    for left in ("", RUN_FILE, ARTIFACT_FILE, f"{CHECKPOINTS}/checkpoint-3", f"{CHECKPOINTS}/{checkpoint.LATEST}"):
        assert not disk._changed(tmp_path / "sft" / left), left
    assert disk.unsynced(tmp_path / "sft" / "model") == []
    assert disk.unsynced(next(path for path in (tmp_path / "cache" / "chatalign").iterdir() if path.is_dir())) == []
