"""What a model's name stands for: a Hub id, a model folder, an adapter folder or a run folder. Light: no torch.

Beside every adapter that chatalign saves lies ``base_model.json``, the base's name, revision and the sha256 of its
weights, so that an adapter is never put on another base (peft would load it with a warning at most).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chatalign.artifact import (
    ARTIFACT_FILE,
    MODEL_FOLDER,
    Artifact,
    BaseModelRef,
    Kind,
    fingerprint,
    load_artifact,
    sha256_file,
    sha256_weights,
    write_json,
)
from chatalign.errors import HubError, ModelError

ADAPTER_CONFIG = "adapter_config.json"
BASE_MODEL_FILE = "base_model.json"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A model by its parts.

    `base` is the Hub id or folder to load weights from, `source` the one to load the tokenizer from (the adapter's
    folder where there is one), `adapter` the adapter's folder, `expected_base_sha256` what the adapter was trained on.
    """

    base: str
    revision: str
    source: str
    kind: Kind
    adapter: Path | None = None
    artifact: Artifact | None = None
    expected_base_sha256: str | None = None


def resolve(name_or_path: str, *, revision: str = "main", online: bool = True) -> Resolved:
    """What `name_or_path` stands for.

    With `online` false a Hub id is answered from the local cache alone. Raises ModelError where a folder is
    neither a model, an adapter nor a finished run, or where an adapter's base can't be found.
    """
    place = Path(name_or_path)
    if place.is_dir():
        return _resolve_folder(place, revision)
    if place.is_file() or place.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ModelError(f"{name_or_path}: no such model folder; give a folder, a run folder or a Hub id")
    adapter = _hub_adapter(name_or_path, revision, online=online)
    if adapter is not None:
        return _resolve_adapter(adapter, artifact=None)
    return Resolved(base=name_or_path, revision=revision, source=name_or_path, kind="model")


def _resolve_folder(folder: Path, revision: str) -> Resolved:
    artifact = None
    if (folder / MODEL_FOLDER).is_dir() and not (folder / "config.json").is_file():
        artifact = load_artifact(folder)
        folder = folder / MODEL_FOLDER
    elif (folder.parent / ARTIFACT_FILE).is_file() and folder.name == MODEL_FOLDER:
        artifact = load_artifact(folder.parent)
    if (folder / ADAPTER_CONFIG).is_file():
        return _resolve_adapter(folder, artifact)
    config = _read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    is_reward = any(name.endswith("ForSequenceClassification") for name in architectures)
    kind: Kind = "reward_model" if is_reward else "model"
    return Resolved(base=str(folder), revision=revision, source=str(folder), kind=kind, artifact=artifact)


def _resolve_adapter(folder: Path, artifact: Artifact | None) -> Resolved:
    config = _read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: a {config.get('peft_type')} adapter; chatalign goes on from LoRA adapters only")
    recorded = read_base_ref(folder)
    base = recorded.name_or_path if recorded else config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: names no base model; set `base_model_name_or_path`")
    revision = (recorded.revision if recorded else config.get("revision")) or "main"
    inner = _from_where_it_was_saved(base, folder)
    if inner.is_dir():
        inner_resolved = _resolve_folder(inner, revision)
        if inner_resolved.adapter is not None:
            raise ModelError(f"{folder}: its base {base} is an adapter itself; merge that one first (chatalign merge)")
        base = inner_resolved.base
    elif inner.is_absolute() or base.count("/") > 1:
        raise ModelError(
            f"{folder}: its base model {base} is not there; put it back, or set `name_or_path` in "
            f"{folder / BASE_MODEL_FILE} and `base_model_name_or_path` in {ADAPTER_CONFIG}"
        )
    return Resolved(
        base=base,
        revision=revision,
        source=str(folder),
        kind="reward_adapter" if config.get("task_type") == "SEQ_CLS" else "adapter",
        adapter=folder,
        artifact=artifact,
        expected_base_sha256=recorded.sha256 if recorded else None,
    )


def _from_where_it_was_saved(base: str, adapter: Path) -> Path:
    """A base's folder, relative to here or, for an adapter opened from elsewhere, to a folder above the adapter."""
    places = [Path(base), *(parent / base for parent in adapter.resolve().parents)]
    return next((place for place in places if place.is_dir()), Path(base))


def read_base_ref(folder: str | Path) -> BaseModelRef | None:
    """The base that an adapter's folder records, or None (an adapter that chatalign didn't save)."""
    path = Path(folder) / BASE_MODEL_FILE
    if not path.is_file():
        return None
    try:
        return BaseModelRef.model_validate(_read_json(path))
    except ValidationError as error:
        raise ModelError(f"{path}: not a base model's record ({str(error).splitlines()[0]}); delete it") from None


def write_base_ref(folder: str | Path, base_ref: BaseModelRef) -> Path:
    """Record beside an adapter which base it belongs to."""
    return write_json(Path(folder) / BASE_MODEL_FILE, base_ref.model_dump(mode="json"))


def base_sha256(base: str, revision: str = "main") -> str | None:
    """The hash of a base's weight files, the same for a folder and for the Hub's cached copy of it.

    The Hub's cache names large files by their sha256, so that nothing is read there. None where no safetensors
    file is found.
    """
    folder = local_folder(base, revision)
    if folder is None or folder == Path(base):
        return sha256_weights(base) if folder else None
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        blob = path.resolve().name
        hashes[path.name] = blob if len(blob) == 64 else sha256_file(path)
    return fingerprint(hashes) if hashes else None


def local_folder(name: str, revision: str = "main") -> Path | None:
    """Where a model's files are: the folder itself, or the Hub's cached copy of it; None where it isn't cached."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _hub_adapter(repo: str, revision: str, *, online: bool) -> Path | None:
    """The local copy of a Hub repository that holds an adapter; None where it is a model (or isn't known yet)."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.file_download import hf_hub_download

    cached = try_to_load_from_cache(repo, ADAPTER_CONFIG, revision=revision)
    if isinstance(cached, str) and not online:
        return Path(cached).parent
    if not online or isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str):
        return None
    try:
        hf_hub_download(repo, ADAPTER_CONFIG, revision=revision)
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise HubError(
            f"{repo}: no folder of that name, and the Hub can't be reached; check the spelling or the network"
        ) from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, ValueError) as error:
        raise HubError(
            f"{repo}: {str(error).splitlines()[0]}; check the name, and log in with `hf auth login`"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent}: no {path.name} here; give a model folder, an adapter folder or a run folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: can't be read ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no mapping; restore the file")
    return value
