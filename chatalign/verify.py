"""``chatalign verify RUN``: everything that a run recorded is hashed again, and what no longer matches is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chatalign import checkpoint
from chatalign.artifact import (
    ARTIFACT_FILE,
    CHECKPOINTS,
    Artifact,
    DataUsed,
    load_artifact,
    sha256_file,
    sha256_weights,
    verify_files,
)
from chatalign.errors import ArtifactError, CheckpointError
from chatalign.report.lineage import finished_runs


@dataclass(frozen=True)
class Verdict:
    """One thing that was hashed again. `problem` is None where it is as it was recorded."""

    what: str
    problem: str | None = None


def verify_run(folder: str | Path) -> Iterator[Verdict]:
    """Hash a stage's or a pipeline's files, parents, base models, data and checkpoints again, stage by stage.

    Raises ArtifactError where the folder holds no finished run.
    """
    folder = Path(folder)
    for name, artifact in finished_runs(folder).items():
        place = folder if (folder / ARTIFACT_FILE).is_file() else folder / name
        yield _files(place, artifact)
        yield from (_parent(place, role, path, run_id) for role, path, run_id in _parents(artifact))
        yield from _base(place, artifact)
        yield from (_data(place, used) for used in artifact.data if Path(used.path).exists())
        yield from _checkpoints(place, artifact)


def _files(place: Path, artifact: Artifact) -> Verdict:
    problems = verify_files(place, artifact.files)
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return Verdict(f"{place}: {len(artifact.files)} files", f"{problems[0]}{more}" if problems else None)


def _parents(artifact: Artifact) -> list[tuple[str, str, str]]:
    return [(parent.role, parent.path, parent.run_id) for parent in artifact.parents]


def _parent(place: Path, role: str, path: str, run_id: str) -> Verdict:
    what = f"{place}: {role} is run {run_id} in {path}"
    try:
        found = load_artifact(path).run_id
    except ArtifactError as error:
        return Verdict(what, f"{place}: its {role} can't be looked at: {error}")
    if found != run_id:
        return Verdict(what, f"{place}: its {role} was run {run_id}, and {path} holds run {found} now")
    return Verdict(what)


def _base(place: Path, artifact: Artifact) -> Iterator[Verdict]:
    base = artifact.base_model
    if base is None or base.sha256 is None:
        return
    what = f"{place}: base model {base.name_or_path}"
    if not Path(base.name_or_path).is_dir():
        yield Verdict(what, f"{base.name_or_path}: missing; {place} was made from it (sha256 {base.sha256[:12]}…)")
    elif (found := sha256_weights(base.name_or_path)) != base.sha256:
        yield Verdict(
            what, f"{base.name_or_path}: has sha256 {str(found)[:12]}…, {place} was made from {base.sha256[:12]}…"
        )
    else:
        yield Verdict(what)


def _data(place: Path, used: DataUsed) -> Verdict:
    what = f"{place}: rows of {used.path}"
    file = Path(used.path)
    found = sha256_file(file) if file.is_file() else _folder_sha256(used)
    problem = f"{used.path}: altered since {place} read it (sha256 {found[:12]}…, then {used.sha256[:12]}…)"
    return Verdict(what, None if found == used.sha256 else problem)


def _folder_sha256(used: DataUsed) -> str:
    from chatalign.data.sources import read_source
    from chatalign.recipe import DatasetSource

    return read_source(DatasetSource(path=used.path), keep_broken=True).sha256


def _checkpoints(place: Path, artifact: Artifact) -> Iterator[Verdict]:
    for folder in checkpoint.list_checkpoints(place / CHECKPOINTS):
        try:
            checkpoint.verify(folder, artifact.run_id)
        except CheckpointError as error:
            yield Verdict(str(folder), str(error))
        else:
            yield Verdict(str(folder))
