"""A disk that is full at every size at which a file of a run could be cut off: one line, no half checkpoint, and on."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from chatalign import checkpoint
from chatalign.artifact import load_artifact
from chatalign.errors import CheckpointError
from chatalign.launch import EXIT_REFUSED
from faults.killed_chain import PRELOADED, ROOT

SETTINGS: dict[str, Any] = {
    "stage": "sft",
    "lora": {"r": 4, "lora_alpha": 8},
    "model": {"name_or_path": "data/pocket/base"},
    "data": {"datasets": [{"path": "data/pocket/sft.jsonl", "max_rows": 32}], "max_length": 128},
    "train": {"max_steps": 4, "save_steps": 1, "save_total_limit": None, "per_device_train_batch_size": 1},
}


def run(folder: Path, limit: int | None) -> None:
    """Train in this process, no file of which may become larger than `limit` bytes; ends as the command would."""
    from chatalign import sft
    from chatalign.launch import execute, guarded

    os.chdir(ROOT)
    recipe = folder.parent / f"{folder.name}.json"
    recipe.write_text(json.dumps(SETTINGS | {"output_dir": str(folder)}))
    sys.stderr = io.StringIO()  # a file of it would be cut off too
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, as on a full disk, and the process lives
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        code = guarded(lambda: execute("sft", sft.run, str(recipe), []))
    except BaseException:
        traceback.print_exc()
        code = 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    words_of(folder).write_text(sys.stderr.getvalue())
    os._exit(code)


def words_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.err"


def started(folder: Path, limit: int | None = None) -> tuple[int, str]:
    """Exit status and stderr of a run in a process of its own, from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run, args=(folder, limit))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode, words_of(folder).read_text()


def weights(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_disk_that_is_full_at_any_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert started(whole)[0] == 0
    sizes = {path.stat().st_size for path in whole.rglob("*") if path.is_file() and "plots" not in path.parts}
    limits = sorted({size - 1 for size in sizes if size > 1})
    spread = [limits[round(place * (len(limits) - 1) / 19)] for place in range(20)]
    stopped = 0
    for number, limit in enumerate(dict.fromkeys(spread)):
        folder = tmp_path / f"full{number}"
        code, words = started(folder, limit)
        said = [line for line in words.splitlines() if line.startswith("chatalign: ")]
        checkpoints = folder / "checkpoints"
        for made in checkpoint.list_checkpoints(checkpoints):  # none is visible that isn't whole
            checkpoint.verify(made, json.loads((folder / "run.json").read_text())["run_id"])
        if code != 0:
            stopped += 1
            assert code == EXIT_REFUSED, f"{limit}: {words}"
            assert len(said) == 1, words
            assert "run the same command" in said[0] or "set HF_DATASETS_CACHE to a folder with space" in said[0]
            assert not (folder / "artifact.json").exists()
        if number % 4:
            continue
        assert started(folder)[0] == 0  # with room again
        assert load_artifact(folder).metrics == load_artifact(whole).metrics
        assert weights(folder) == weights(whole)
    assert stopped >= 10


def test_how_much_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import shutil
    from collections import namedtuple

    from chatalign.engine.disk import room_for

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 3_000_000, 3_000_000))
    words = r"no room for a checkpoint \(it takes 8.0 MB, 3.0 MB are free, 5.0 MB are missing\); make some"
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        folder = tmp_path / ".saving"
        folder.mkdir()
        (folder / "half").write_text("x")
        with pytest.raises(CheckpointError, match=words), room_for(folder, 8_000_000, "a checkpoint"):
            raise error
        assert not folder.exists()
    with pytest.raises(RuntimeError, match="shapes"), room_for(tmp_path / "other", 1, "a checkpoint"):
        raise RuntimeError("shapes differ")
