"""Whether replies can end: the template's stop token, the model folder's generation config, pad, and the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatalign.check.findings import Finding
from chatalign.errors import ChatalignError, ModelError
from chatalign.recipe import ModelSection


def stop_findings(section: ModelSection, tokenizer: Any, *, name: str, templated: bool) -> Iterator[Finding]:
    """What the tokenizer and the model's own files say about ends of replies, without the weights."""
    stop: int | None = None
    if templated and tokenizer.chat_template:
        from chatalign.data import template_stop_ids

        try:
            stop = template_stop_ids(tokenizer)[0]
        except ChatalignError as error:
            yield Finding("stop_tokens", f"the stop token of {name}'s template", error)
            return
        token = tokenizer.convert_ids_to_tokens(stop)
        yield Finding("stop_tokens", f"{name}: replies end in {token}, padding is {tokenizer.pad_token}")
    folder = model_folder(section)
    if folder is None:
        return
    yield _vocabulary(folder, tokenizer)
    if note := _configured(folder, tokenizer, stop):
        yield Finding("stop_tokens", f"{folder}: generation stops", note=note)


def model_folder(section: ModelSection) -> Path | None:
    """The folder of a section's base model on this machine, under its adapter where it has one; else None."""
    from chatalign.models.resolve import local_folder, resolve

    if not section.name_or_path or not Path(section.name_or_path).is_dir():
        return None
    try:
        resolved = resolve(section.name_or_path, revision=section.revision, online=False)
    except ChatalignError:
        return None  # said by the check of the model itself
    return local_folder(resolved.base, resolved.revision)


def _vocabulary(folder: Path, tokenizer: Any) -> Finding:
    rows = _read(folder / "config.json").get("vocab_size")
    highest = max(tokenizer.get_vocab().values())
    what = f"{folder}: every token has an embedding row"
    if not isinstance(rows, int) or highest < rows:
        return Finding("stop_tokens", what)
    return Finding(
        "stop_tokens",
        what,
        ModelError(
            f"{folder}: the tokenizer has ids up to {highest}, the model {rows} embedding rows; "
            f"use the model's own tokenizer (chatalign doesn't resize vocabularies)"
        ),
    )


def _configured(folder: Path, tokenizer: Any, stop: int | None) -> str | None:
    """A note where the model folder's own stop tokens are not what training teaches."""
    file = next(
        (folder / name for name in ("generation_config.json", "config.json") if (folder / name).is_file()), None
    )
    if file is None:
        return None
    settings = _read(file)
    configured = settings.get("eos_token_id")
    stops = configured if isinstance(configured, list) else [configured]
    mended = "chatalign sets it right in what it trains and saves; mend it for other programs that load this folder"
    pad = settings.get("pad_token_id")
    if pad is not None and pad in stops and len(stops) > 1:
        return f"{file}: `pad_token_id` {pad} is among `eos_token_id` {configured} → {mended}"
    if stop is not None and configured is not None and stop not in stops:
        token = tokenizer.convert_ids_to_tokens(stop)
        return f"{file}: `eos_token_id` {configured} lacks the template's stop token {token} ({stop}) → {mended}"
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
