"""Prepared tokens on disk: arrow files that are mapped, not loaded, kept by the hash of all that they depend on.

They lie in ``HF_DATASETS_CACHE/chatalign``. Of several processes with one key (ranks, pipelines) the first writes and
the others wait; a folder appears whole or not at all, sealed with what it was made from and its files' hashes, which
every later run compares. With ``datasets.disable_caching()`` the files are written anew and go with the session.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow
import tokenizers
import transformers
from datasets.fingerprint import get_temporary_cache_files_directory
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from chatalign.artifact import fingerprint, sha256_file, sync_files, verify_files, write_json
from chatalign.errors import DataError, GuardError

SEAL = "made_from.json"
_BATCH = 4000  # rows; few enough to hold, and datasets looks rows up by batch


@dataclass(frozen=True)
class TokensKey:
    """All that tokens depend on, as a hash for each part, by the name that an error calls it by."""

    parts: dict[str, str]

    @property
    def name(self) -> str:
        """The name of the folder that the tokens are kept in."""
        return fingerprint(self.parts)


def tokens_key(tokenizer: Any, *, rows: list[str], **settings: Any) -> TokensKey:
    """The hashes of the rows, the settings, the tokenizer, its template, the libraries' versions and our data code."""
    template = str(tokenizer.chat_template or "")
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    today = date.today().isoformat() if "strftime_now" in template else None  # the text holds the date
    parts = {
        "rows": rows,
        "`data` section": settings,
        "tokenizer": [type(tokenizer).__qualname__, tokenizer.backend_tokenizer.to_str(), special],
        "chat template": [template, today],
        "libraries' versions": [tokenizers.__version__, transformers.__version__, jinja2.__version__],
        "code": [sha256_file(path) for path in sorted(Path(__file__).parent.glob("*.py"))],
    }
    return TokensKey({name: fingerprint(value) for name, value in parts.items()})


def stored(key: TokensKey, write: Callable[[Path], None]) -> Path:
    """The folder of the tokens of `key`; `write` fills it where it isn't there yet.

    Raises DataError where the cache can't be used, GuardError where what is kept was altered or made from something
    else, or where another process of the launch has other tokens. What `write` raises passes through, and leaves
    nothing behind.
    """
    if not datasets.is_caching_enabled():
        folder = Path(tempfile.mkdtemp(dir=get_temporary_cache_files_directory()))
        write(folder)
        _seal(folder, key)
    else:
        folder = _kept(key, write)
        _refuse_stale(folder, key)
    _refuse_other_ranks(_read_seal(folder)[1])
    return folder


def _kept(key: TokensKey, write: Callable[[Path], None]) -> Path:
    home = Path(datasets.config.HF_DATASETS_CACHE) / "chatalign"
    folder = home / key.name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(home / f"{key.name}.lock"):
            if not folder.is_dir():
                _write_aside(folder, key, write)
    except OSError as error:
        raise DataError(f"{home}: can't be written ({error}); set HF_DATASETS_CACHE to a folder with space") from None
    return folder


def _write_aside(folder: Path, key: TokensKey, write: Callable[[Path], None]) -> None:
    prefix = f".{folder.name[:16]}-"
    for left in folder.parent.glob(f"{prefix}*"):  # by a process that was killed: who holds the lock writes alone
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        write(aside)
        _seal(aside, key)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _seal(folder: Path, key: TokensKey) -> None:
    """Record what the tokens were made from, and the sha256 of each file, all on the disk before the folder moves."""
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    sync_files(folder, files)
    write_json(folder / SEAL, {"made_from": key.parts, "files": files})


def _read_seal(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What the tokens in a folder were made from, and the sha256 of each file."""
    try:
        seal = json.loads((folder / SEAL).read_text("utf-8"))
        return seal["made_from"], seal["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuardError(f"{folder / SEAL}: can't be read ({error!r}); delete {folder} and start again") from None


def _refuse_stale(folder: Path, key: TokensKey) -> None:
    """Raise GuardError unless the kept tokens are those that were written, from what this run has.

    Apart from the folder's name: a part that the name left out, or a folder that was renamed, would give stale tokens.
    """
    made_from, files = _read_seal(folder)
    for name, digest in key.parts.items():
        if made_from.get(name) != digest:
            raise GuardError(
                f"{folder}: the tokens kept here were made with another {name} than this run's; "
                f"delete the folder and start again"
            )
    if problems := verify_files(folder, files):
        raise GuardError(f"{problems[0]}; delete {folder} and start again")


def _refuse_other_ranks(files: dict[str, str]) -> None:
    """Raise GuardError where the processes of one launch don't hold the same rows on the same sides of the split."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, files)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise GuardError(
                f"process {rank} prepared other rows than process 0 (sha256 of {_first_difference(theirs, found[0])} "
                f"differs); give every machine the same data files, tokenizer and chatalign"
            )


def _first_difference(theirs: dict[str, str], ours: dict[str, str]) -> str:
    return next(name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name))


class TableFile:
    """An arrow file that tables are appended to, in batches of some thousand rows; made at the first rows."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        self.path, self.schema = path, schema
        self.rows = 0
        self._waiting: list[pyarrow.Table] = []
        self._writer: pyarrow.RecordBatchStreamWriter | None = None

    def append(self, table: pyarrow.Table) -> None:
        """Put a table's rows behind those that are there."""
        if len(table):
            self._waiting.append(table)
            self.rows += len(table)
        if sum(map(len, self._waiting)) >= _BATCH:
            self._write()

    def _write(self) -> None:
        if self._writer is None:
            self._writer = pyarrow.ipc.new_stream(str(self.path), self.schema)
        self._writer.write_table(pyarrow.concat_tables(self._waiting).combine_chunks())
        self._waiting.clear()

    def __enter__(self) -> TableFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._waiting:
            self._write()
        if self._writer is not None:
            self._writer.close()
