"""Checkpoints: whole ones are found, damaged ones are passed over and named, another run's are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from chatalign.checkpoint import (
    LATEST,
    MANIFEST,
    begin,
    latest_valid,
    list_checkpoints,
    prune,
    publish,
    read_manifest,
    tidy,
    verify,
    write_manifest,
)
from chatalign.errors import CheckpointError


def make(folder: Path, step: int, run_id: str = "mine", *, sealed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(100) + step.to_bytes(2, "big"))
    (checkpoint / "inner" / "optimizer.pt").write_bytes(b"state")
    if sealed:
        write_manifest(checkpoint, run_id, {"tokens_seen": step})
    return checkpoint


def test_newest_by_step_not_by_name_or_time(tmp_path: Path) -> None:
    newest = make(tmp_path, 100)
    make(tmp_path, 20)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert latest_valid(tmp_path, "mine") == newest
    assert read_manifest(newest)["extra"] == {"tokens_seen": 100}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]


@pytest.mark.parametrize("fault", ["bit", "deleted", "no manifest", "half a manifest", "emptied"])
def test_damaged_one_is_named_and_the_one_before_taken(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = make(tmp_path, 1), make(tmp_path, 2)
    weights = newest / "model.safetensors"
    if fault == "bit":
        content = bytearray(weights.read_bytes())
        content[50] ^= 1
        weights.write_bytes(content)
    elif fault == "deleted":
        (newest / "inner" / "optimizer.pt").unlink()
    elif fault == "emptied":
        weights.write_bytes(b"")
    elif fault == "no manifest":
        (newest / MANIFEST).unlink()
    else:
        text = (newest / MANIFEST).read_text()
        (newest / MANIFEST).write_text(text[: len(text) // 2])
    with caplog.at_level(logging.WARNING, logger="chatalign"):
        assert latest_valid(tmp_path, "mine") == before
    assert str(newest) in caplog.text
    with pytest.raises(CheckpointError):
        verify(newest, "mine")


def test_none_is_none(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "nothing", "mine") is None
    make(tmp_path, 1, sealed=False)
    assert latest_valid(tmp_path, "mine") is None


def test_other_runs_checkpoint_is_refused_not_skipped(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2, run_id="theirs")
    with pytest.raises(CheckpointError, match=r"checkpoint-2: belongs to run theirs"):
        latest_valid(tmp_path, "mine")


def test_manifest_names_every_file_but_itself(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 1)
    write_manifest(checkpoint, "mine")  # sealed again: the manifest is not its own content
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert sorted(manifest["files"]) == ["inner/optimizer.pt", "model.safetensors"]
    verify(checkpoint, "mine")


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 5):
        make(tmp_path, step)
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    make(tmp_path, 4, sealed=False)
    removed = prune(tmp_path, keep=2, run_id="mine")
    assert [path.name for path in removed] == ["checkpoint-1"]
    assert latest_valid(tmp_path, "mine") == tmp_path / "checkpoint-3"


def test_prune_never_leaves_a_run_without_a_whole_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 1)
    for step in (2, 3, 4):
        make(tmp_path, step, sealed=False)
    assert prune(tmp_path, keep=1, run_id="mine") == []
    assert latest_valid(tmp_path, "mine") == tmp_path / "checkpoint-1"
    make(tmp_path, 5)
    assert len(prune(tmp_path, keep=1, run_id="mine")) == 4
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-5"]


def test_a_checkpoint_is_written_aside_and_reaches_its_place_whole(tmp_path: Path) -> None:
    left = make(begin(tmp_path), 2, sealed=False)  # by a save that was killed
    assert list_checkpoints(tmp_path) == []
    saved = make(begin(tmp_path), 4, sealed=False)
    assert not left.exists()
    place = publish(saved, "mine", {"tokens_seen": 4})
    assert place == tmp_path / "checkpoint-4"
    assert verify(place, "mine")["extra"] == {"tokens_seen": 4}
    assert "torch" in json.loads((place / MANIFEST).read_text())["versions"]
    assert (tmp_path / LATEST).read_text() == "checkpoint-4\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "checkpoint-4"]
    (place / "model.safetensors").unlink()  # damaged: a resume trains this step again, and saves it again
    publish(make(begin(tmp_path), 4, sealed=False), "mine")
    assert latest_valid(tmp_path, "mine") == place


@pytest.mark.parametrize("left", ["nothing", "a half-written one", "another LATEST", "no LATEST", "one too many"])
def test_what_a_killed_save_left_is_tidied_up(left: str, tmp_path: Path) -> None:
    for step in (2, 4):
        publish(make(begin(tmp_path), step, sealed=False), "mine")
    if left == "a half-written one":
        make(begin(tmp_path), 6, sealed=False)
    elif left == "another LATEST":
        (tmp_path / LATEST).write_text("checkpoint-2\n")
        (tmp_path / f".{LATEST}.4194305.new").write_text("check")  # no process has so high a number
    elif left == "no LATEST":
        (tmp_path / LATEST).unlink()
    elif left == "one too many":
        make(tmp_path, 1)
        (tmp_path / "checkpoint-1" / MANIFEST).unlink()  # half of it is gone
    tidy(tmp_path, tmp_path / "checkpoint-4", keep=2, run_id="mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "checkpoint-2", "checkpoint-4"]
    assert (tmp_path / LATEST).read_text() == "checkpoint-4\n"
    tidy(tmp_path, tmp_path / "checkpoint-4", keep=None, run_id="mine")
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]


def test_a_first_save_that_was_killed_leaves_nothing_behind_where_no_save_follows(tmp_path: Path) -> None:
    tidy(tmp_path / "checkpoints", None, keep=2, run_id="mine")  # a run that begins has no such folder
    make(begin(tmp_path), 2, sealed=False)
    tidy(tmp_path, None, keep=2, run_id="mine")
    assert list(tmp_path.iterdir()) == []
