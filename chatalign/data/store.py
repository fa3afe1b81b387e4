"""Prepared tokens on disk: arrow files that are mapped, not loaded, kept by the hash of all that they depend on.

They lie in ``HF_DATASETS_CACHE/chatalign``. Of several processes with one key (ranks, pipelines) the first writes and
the others wait; a folder appears whole or not at all. With ``datasets.disable_caching()`` the files are written anew
and go with the session.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import tokenizers
import transformers
from datasets.fingerprint import get_temporary_cache_files_directory
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from chatalign.artifact import fingerprint, sha256_file
from chatalign.errors import DataError

_BATCH = 4000  # rows; few enough to hold, and datasets looks rows up by batch


def tokens_key(tokenizer: Any, **settings: Any) -> str:
    """The hash of `settings`, the tokenizer, its template, the libraries' versions and the code of this package."""
    template = str(tokenizer.chat_template or "")
    return fingerprint(
        {
            **settings,
            "tokenizer": [type(tokenizer).__qualname__, tokenizer.backend_tokenizer.to_str()],
            "special_tokens": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
            "chat_template": template,
            "today": date.today().isoformat() if "strftime_now" in template else None,  # the text holds the date
            "versions": [tokenizers.__version__, transformers.__version__],
            "code": [sha256_file(path) for path in sorted(Path(__file__).parent.glob("*.py"))],
        }
    )


def stored(key: str, write: Callable[[Path], None]) -> Path:
    """The folder of `key`; `write` fills it where it isn't there yet. Raises DataError where the cache can't be used.

    What `write` raises passes through, and leaves nothing behind.
    """
    if not datasets.is_caching_enabled():
        folder = Path(tempfile.mkdtemp(dir=get_temporary_cache_files_directory()))
        write(folder)
        return folder
    home = Path(datasets.config.HF_DATASETS_CACHE) / "chatalign"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(home / f"{key}.lock"):
            if not (home / key).is_dir():
                _write_aside(home / key, write)
    except OSError as error:
        raise DataError(f"{home}: can't be written ({error}); set HF_DATASETS_CACHE to a folder with space") from None
    return home / key


def _write_aside(folder: Path, write: Callable[[Path], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
    try:
        write(aside)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
