"""What a finished stage hands on: ``artifact.json``, the lineage of every run, beside ``model/``.

A run folder holds::

    artifact.json   recipe.yaml   metrics.jsonl   report.md   plots/
    model/          what is published: safetensors, tokenizer, template, generation config
    checkpoints/    what a killed run goes on from

Light: no torch here.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from chatalign import __version__
from chatalign.errors import ArtifactError
from chatalign.recipe.sections import Section

ARTIFACT_FILE = "artifact.json"
RUN_FILE = "run.json"
MODEL_FOLDER = "model"
CHECKPOINTS = "checkpoints"
Kind = Literal["model", "adapter", "reward_model", "reward_adapter", "evaluation"]


class BaseModelRef(Section):
    """The model that an adapter hangs on, or that a full model started from."""

    name_or_path: str
    revision: str | None = None
    sha256: str | None = None  # of its weight files, where it is a folder


class Parent(Section):
    """An earlier run that this one took something from."""

    role: str  # model, reward_model, …
    path: str
    run_id: str
    fingerprint: str


class DataUsed(Section):
    """A source of rows as it was read: its content's hash and what became of its rows."""

    path: str
    sha256: str
    format: str
    rows: int
    used: int
    dropped: dict[str, int] = {}  # reason → count
    examples: dict[str, list[str]] = {}  # reason → where the first of those rows stand, file:row


class Artifact(Section):
    """The record of one finished stage."""

    stage: str
    kind: Kind
    run_id: str
    fingerprint: str
    base_model: BaseModelRef | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    parents: list[Parent] = []
    recipe: dict[str, Any] = {}
    data: list[DataUsed] = []
    seeds: dict[str, int] = {}
    metrics: dict[str, float] = {}
    extra: dict[str, Any] = {}  # a stage's own facts: the reward normaliser, the KL controller's last value …
    versions: dict[str, str] = Field(default_factory=lambda: versions())
    wall_s: float = 0.0
    tokens_seen: int = 0
    tokens_per_s: float = 0.0
    files: dict[str, str] = {}  # path inside the run folder → sha256

    def save(self, folder: str | Path) -> Path:
        """Write ``artifact.json`` into `folder`, whole or not at all, once all that it names is on the disk."""
        sync_files(folder, self.files)
        return write_json(Path(folder) / ARTIFACT_FILE, self.model_dump(mode="json"))


def load_artifact(folder: str | Path) -> Artifact:
    """The artifact of a run folder; raises ArtifactError where there is none or it can't be read."""
    path = Path(folder) / ARTIFACT_FILE
    try:
        return Artifact.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; {folder} is no finished run (run its recipe first)") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: can't be read ({reason}); delete the folder and run its recipe again") from None


def verify_files(folder: str | Path, files: dict[str, str]) -> list[str]:
    """What no longer matches: one line for each file that is missing or has another sha256."""
    problems = []
    for name, expected in files.items():
        path = Path(folder) / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif sha256_file(path) != expected:
            problems.append(f"{path}: altered since it was written")
    return problems


def hash_files(folder: str | Path, subfolder: str = MODEL_FOLDER) -> dict[str, str]:
    """sha256 of every file under ``folder/subfolder``, keyed by its path inside `folder`, sorted."""
    root = Path(folder)
    return {
        path.relative_to(root).as_posix(): sha256_file(path)
        for path in sorted((root / subfolder).rglob("*"))
        if path.is_file()
    }


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_weights(folder: str | Path) -> str | None:
    """One hash for all safetensors files of a model folder, independent of the folder's place; None without any."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    return fingerprint({path.name: sha256_file(path) for path in files})


def fingerprint(value: Any) -> str:
    """Hex sha256 of a JSON-like value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> Path:
    """Write JSON whole or not at all, as :func:`write_whole` does."""
    return write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> Path:
    """Write a file aside, fsync, rename: a reader, and a start after a power cut, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.new"):
        if not _lives(int(left.name.split(".")[-2])):  # its writer was killed
            left.unlink(missing_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")  # a report may be asked for while a run writes it
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)
    return path


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def sync(path: str | Path) -> None:
    """Bring a file's content, or a folder's names, to disk; a file is there after a power cut only with both."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: str | Path, names: Iterable[str]) -> None:
    """Bring files, by their paths inside `folder`, to disk, and the names of all folders on the way."""
    folder = Path(folder)
    inner = {folder}
    for name in names:
        sync(folder / name)
        inner |= {folder / parent for parent in Path(name).parents}
    for place in sorted(inner, reverse=True):  # the innermost first
        sync(place)


_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of chatalign, Python and the libraries that results depend on; reads metadata, imports nothing."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata

    found = {"chatalign": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
