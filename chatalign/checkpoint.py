"""Checkpoints that can be trusted: written aside, with a manifest of every file's sha256, and put in place whole.

A checkpoint without a manifest was cut off while it was written; one whose files differ was altered since; one with
another run's id is another run's. transformers resumes from all three without a word.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatalign.artifact import (
    fingerprint,
    hash_files,
    sync,
    sync_files,
    verify_files,
    versions,
    write_json,
    write_whole,
)
from chatalign.errors import CheckpointError, OtherRunError

MANIFEST = "manifest.json"
SAVING = ".saving"  # in the folder of checkpoints: where the next one is written
LATEST = "LATEST"  # names the newest, for people and their tools; a resume looks at the manifests
_NAME = re.compile(r"^checkpoint-(\d+)$")
_PASSED_OVER = "a resume takes the checkpoint before it"
_log = logging.getLogger("chatalign")


def begin(checkpoints: str | Path) -> Path:
    """An empty folder for the next checkpoint to be written into; what a killed save left there goes."""
    aside = Path(checkpoints) / SAVING
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    return aside


def publish(
    saved: Path, run_id: str, extra: Mapping[str, Any] | None = None, made_from: Mapping[str, Any] | None = None
) -> Path:
    """Seal a checkpoint that lies in :func:`begin`'s folder and move it to its place, which it reaches whole.

    To be called once every process has written its files.
    """
    write_manifest(saved, run_id, extra, made_from)
    place = saved.parent.parent / saved.name
    if place.exists():  # a resume passed it over, since it is damaged
        shutil.rmtree(place)
    os.replace(saved, place)
    saved.parent.rmdir()
    for folder in (place.parent, place.parent.parent):  # the latter: the first save made the folder of checkpoints
        sync(folder)
    write_whole(place.parent / LATEST, f"{place.name}\n")
    return place


def tidy(checkpoints: Path, newest: Path | None, *, keep: int | None, run_id: str) -> None:
    """Do what a save that was killed had yet to do: take its folder away, name the newest whole checkpoint, prune.

    One process calls it before training goes on from `newest`, or begins anew (None): a save need not follow.
    """
    if (checkpoints / SAVING).exists():
        shutil.rmtree(checkpoints / SAVING)
    if newest is None:
        return
    latest = checkpoints / LATEST
    if not latest.is_file() or latest.read_bytes() != f"{newest.name}\n".encode():
        write_whole(latest, f"{newest.name}\n")
    if keep is not None and len(list_checkpoints(checkpoints)) > keep:
        prune(checkpoints, keep=keep, run_id=run_id)


def write_manifest(
    checkpoint: str | Path,
    run_id: str,
    extra: Mapping[str, Any] | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> Path:
    """Seal a checkpoint: sync its files to disk, then write their hashes and the manifest's own, whole or not at all.

    `extra` is whatever a resume must find again; `made_from` names what the run depends on: ``fingerprint``,
    ``recipe``, ``data``, ``base_model``, ``parents``, ``world_size``.
    """
    checkpoint = Path(checkpoint)
    files = hash_files(checkpoint, ".")
    files.pop(MANIFEST, None)
    sync_files(checkpoint, files)
    content = {"run_id": run_id, **(made_from or {}), "versions": versions(), "extra": dict(extra or {})}
    content["files"] = files
    return write_json(checkpoint / MANIFEST, content | {"sha256": _own_sha256(content)})


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says beside it, as it is read again."""
    return fingerprint(json.loads(json.dumps({name: said for name, said in manifest.items() if name != "sha256"})))


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    """A checkpoint's manifest; raises CheckpointError where it is missing or unreadable.

    ``fingerprint`` and ``world_size`` are None where an older chatalign didn't write them.
    """
    path = Path(checkpoint) / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        extra = dict(manifest["extra"])
        since = {name: manifest.get(name, extra.get(name)) for name in ("fingerprint", "world_size")}
        return {
            **manifest,
            **since,
            "run_id": str(manifest["run_id"]),
            "files": dict(manifest["files"]),
            "extra": extra,
        }
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint}: has no {MANIFEST}, so it was cut off while it was saved; {_PASSED_OVER}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); {_PASSED_OVER}") from None


def verify(checkpoint: str | Path, run_id: str) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was saved; raises CheckpointError otherwise."""
    manifest = read_manifest(checkpoint)
    if manifest["run_id"] != run_id:
        raise OtherRunError(
            f"{checkpoint}: belongs to run {manifest['run_id']}, not to this one ({run_id}); "
            f"take it out of the folder, or give another `output_dir`"
        )
    written = json.loads((Path(checkpoint) / MANIFEST).read_text("utf-8"))
    if written.get("sha256", _own_sha256(written)) != _own_sha256(written):  # an older chatalign wrote none
        raise CheckpointError(f"{Path(checkpoint) / MANIFEST}: altered since it was written; {_PASSED_OVER}")
    if problems := verify_files(checkpoint, manifest["files"]):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{more}; {_PASSED_OVER}")
    return manifest


def latest_valid(checkpoints: str | Path, run_id: str) -> Path | None:
    """The newest checkpoint of this run that is whole; None where there is none.

    A damaged one is named in a warning and the one before it is taken. Another run's raises OtherRunError.
    """
    found = list_checkpoints(checkpoints)
    for place, checkpoint in reversed(list(enumerate(found))):
        try:
            verify(checkpoint, run_id)
        except OtherRunError:
            raise
        except CheckpointError as error:
            _log.warning("%s (%s)", error, found[place - 1].name if place else "none: the run begins again")
            continue
        return checkpoint
    return None


def list_checkpoints(checkpoints: str | Path) -> list[Path]:
    """The ``checkpoint-STEP`` folders, oldest first by step."""
    folder = Path(checkpoints)
    if not folder.is_dir():
        return []
    numbered = [
        (int(match[1]), path) for path in folder.iterdir() if path.is_dir() and (match := _NAME.match(path.name))
    ]
    return [path for _, path in sorted(numbered)]


def prune(checkpoints: str | Path, *, keep: int, run_id: str) -> list[Path]:
    """Delete all but the newest `keep` whole checkpoints and what is damaged among the older; returns what went.

    Nothing is deleted where none is whole. Damaged ones count for nothing: a rotation by age alone may
    delete the only checkpoint that works.
    """
    kept = 0
    removed = []
    for checkpoint in reversed(list_checkpoints(checkpoints)):
        if kept >= keep:
            shutil.rmtree(checkpoint)
            removed.append(checkpoint)
            continue
        try:
            verify(checkpoint, run_id)
        except OtherRunError:
            continue
        except CheckpointError:
            if kept:
                shutil.rmtree(checkpoint)
                removed.append(checkpoint)
            continue
        kept += 1
    return removed
