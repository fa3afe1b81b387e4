"""A finished run on the Hub: weights, tokenizer, configurations, a model card and the lineage, in one commit.

What is sent is a list of file names that are known to be wanted; pickles, optimizer states and logs never match.
Paths of this machine are taken out of what is sent. The token is the environment's (``HF_TOKEN``) or the login's.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from chatalign.artifact import ARTIFACT_FILE, MODEL_FOLDER, Artifact, load_artifact, verify_files, write_json
from chatalign.errors import ArtifactError, HubError

ALLOWED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "base_model.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
PENDING_FILE = "push.json"  # in a run folder: an upload that the Hub didn't take yet
_WAITS_S = (1.0, 4.0)  # before the second and third try, where the Hub doesn't say how long
_SILENT_S = 60.0  # a Hub that sends and takes no byte for so long is down; the client would wait for ever
_LONGEST_WAIT_S = 30.0  # a Hub that asks for more is asked again by `chatalign push --pending`
_HOLDS_PATHS = ("config.json", "adapter_config.json", "base_model.json")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_LIBRARY = {"adapter": "peft", "reward_adapter": "peft", "model": "transformers", "reward_model": "transformers"}


def push(run_folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload a finished run's model to `repo_id`, which is made where it doesn't exist; returns its address.

    Until it has arrived the run's ``push.json`` keeps what is to go where, for :func:`push_pending`. Where the Hub
    refuses or can't be reached, HubError says so in one line. Raises ArtifactError where the run is unfinished or its
    files were altered.
    """
    folder = Path(run_folder)
    artifact = load_artifact(folder)
    if artifact.kind not in _LIBRARY:
        raise ArtifactError(f"{folder}: an {artifact.kind} holds no model to push; give a training run's folder")
    if problems := verify_files(folder, {k: v for k, v in artifact.files.items() if k.startswith(f"{MODEL_FOLDER}/")}):
        raise ArtifactError(f"{problems[0]}; run its recipe again before pushing")
    contents = contents_to_push(folder, artifact, repo_id)
    waiting = {"repo": repo_id, "private": private, "run_id": artifact.run_id}
    write_json(folder / PENDING_FILE, waiting | {"reason": "the upload was cut off"})
    try:
        address = _upload(contents, repo_id, private, message=f"{artifact.stage} run {artifact.run_id} (chatalign)")
    except HubError as error:
        write_json(folder / PENDING_FILE, waiting | {"reason": str(error)})
        raise
    (folder / PENDING_FILE).unlink(missing_ok=True)
    return address


def pending(under: str | Path) -> list[Path]:
    """The run folders in `under`, itself included, that wait for an upload, by name."""
    return sorted(file.parent for file in Path(under).rglob(PENDING_FILE))


def push_pending(under: str | Path) -> Iterator[str]:
    """Upload every run in `under` that waits, yielding a line for each that arrived.

    Raises HubError after the last where some still wait, with the first one's reason.
    """
    refused = []
    for folder in pending(under):
        waiting = _read_pending(folder / PENDING_FILE)
        try:
            yield f"{folder}: {push(folder, waiting['repo'], private=waiting['private'])}"
        except HubError as error:
            refused.append(error)
    if refused:
        raise HubError(
            f"{refused[0]}; {len(refused)} uploads still wait, `chatalign push --pending {under}` tries again"
        )


def _read_pending(file: Path) -> dict[str, Any]:
    try:
        waiting = json.loads(file.read_text("utf-8"))
        return {"repo": str(waiting["repo"]), "private": bool(waiting["private"])}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ArtifactError(
            f"{file}: can't be read; delete it, and give `chatalign push {file.parent} --repo …` the repository"
        ) from None


def contents_to_push(folder: Path, artifact: Artifact, repo_id: str) -> dict[str, Path | bytes]:
    """What would be uploaded, by its name in the repository: a file to read, or the very bytes."""
    contents: dict[str, Path | bytes] = {}
    for path in sorted((folder / MODEL_FOLDER).iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in ALLOWED):
            contents[path.name] = _without_paths(path) if path.name in _HOLDS_PATHS else path
    if not any(name.endswith(".safetensors") for name in contents):
        raise ArtifactError(f"{folder / MODEL_FOLDER}: holds no safetensors file; run its recipe again")
    lineage = _scrub(artifact.model_dump(mode="json"))
    contents[ARTIFACT_FILE] = (json.dumps(lineage, indent=2, ensure_ascii=False) + "\n").encode()
    contents["README.md"] = model_card(artifact, repo_id).encode()
    for name, content in contents.items():
        if not name.endswith(".safetensors") and _TOKEN.search(_read(content)):
            raise HubError(
                f"{folder / MODEL_FOLDER / name}: holds what looks like a Hub token; take it out, and revoke it"
            )
    return contents


def _read(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _without_paths(path: Path) -> bytes:
    return (json.dumps(_scrub(json.loads(path.read_text("utf-8"))), indent=2, ensure_ascii=False) + "\n").encode()


def _scrub(value: Any) -> Any:
    """A JSON-like value with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {_scrub(key): _scrub(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_scrub(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and value.count("/") > 1:
        return Path(value).name
    return value


def model_card(artifact: Artifact, repo_id: str) -> str:
    """The repository's README: metadata that the Hub reads, and how the model came about."""
    from huggingface_hub import ModelCard, ModelCardData

    is_reward = artifact.kind.startswith("reward")
    base = artifact.base_model.name_or_path if artifact.base_model else None
    datasets = sorted({used.path for used in artifact.data if _is_hub_id(used.path)})
    data = ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        datasets=datasets or None,
        library_name=_LIBRARY[artifact.kind],
        license=(artifact.recipe.get("hub") or {}).get("license"),
        model_name=repo_id.rpartition("/")[2],
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=["chatalign", artifact.stage, *(["lora"] if artifact.kind.endswith("adapter") else [])],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(artifact, repo_id, base)}"))


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.match(name) is not None and not Path(name).exists()


def _card_text(artifact: Artifact, repo_id: str, base: str | None) -> str:
    what = {"adapter": "A LoRA adapter", "reward_adapter": "A reward model's LoRA adapter"}
    opening = what.get(artifact.kind, "A reward model" if artifact.kind == "reward_model" else "A language model")
    lines = [f"# {repo_id.rpartition('/')[2]}", ""]
    lines += [f"{opening}, made by chatalign's `{artifact.stage}` stage from `{_scrub(base or 'nothing')}`.", ""]
    if artifact.kind.endswith("adapter") and artifact.base_model and not _is_hub_id(artifact.base_model.name_or_path):
        lines += [f"That base is a local folder (weights' sha256 {artifact.base_model.sha256}): publish it too, or", ""]
        lines[-2] += " merge the adapter into it (`chatalign merge`) and publish the whole model."
    lines += ["| metric | value |", "|---|---|"]
    lines += [f"| {name} | {value:.6g} |" for name, value in sorted(artifact.metrics.items())]
    lines += ["", f"Tokens seen: {artifact.tokens_seen:,}. Run `{artifact.run_id}`. Lineage, recipe and versions: "]
    lines[-1] += f"[{ARTIFACT_FILE}]({ARTIFACT_FILE})."
    return "\n".join(lines) + "\n"


def _upload(contents: dict[str, Path | bytes], repo_id: str, private: bool, *, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
    ]
    with _silence_ends(_SILENT_S):
        repo = _retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
        _retried(lambda: api.create_commit(repo.repo_id, operations=additions, commit_message=message), repo_id)
    return str(repo)


@contextmanager
def _silence_ends(seconds: float) -> Iterator[None]:
    """Let the client give up inside where the Hub is silent for so long; it tries a file several times first."""
    from huggingface_hub import get_session

    client = get_session()
    before = client.timeout
    client.timeout = seconds
    try:
        yield
    finally:
        client.timeout = before


def _retried(call: Callable[[], Any], repo_id: str) -> Any:
    """The call's result, tried again where the Hub is overloaded or cut off; a commit arrives whole or not at all."""
    for wait in (*_WAITS_S, None):
        try:
            return call()
        except Exception as error:  # the client's own HTTP library, and so its error types, differ between versions
            asked = _wait_asked_for(error, wait)
            if asked is None:
                raise HubError(f"{repo_id}: {_reason(error)}; nothing local was changed") from error
            time.sleep(asked)


def _wait_asked_for(error: Exception, usual: float | None) -> float | None:
    """Seconds until a call is worth another try; None where it isn't, or where the client has tried for long."""
    response = getattr(error, "response", None)
    if usual is None or response is None or (response.status_code < 500 and response.status_code != 429):
        return None
    header = str(response.headers.get("Retry-After", ""))
    asked = float(header) if header.isdigit() else usual
    return asked if asked <= _LONGEST_WAIT_S else None


def _reason(error: Exception) -> str:
    """One line on why an upload failed, with the way out where there is one."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if status == 401:
        return "the Hub doesn't accept the token (401); log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there (403); take one with write permission for that namespace"
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return f"the Hub answered {status} ({text}); try again later" if status else f"the upload failed ({text})"
