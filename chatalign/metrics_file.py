"""``metrics.jsonl``: how its lines are written and read. Light: reports read it without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """A metrics file's whole lines in order, without a killed run's torn last one; none where there is no file."""
    lines: list[dict[str, Any]] = []
    try:
        text = Path(path).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return lines
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill: the step is trained, and logged, again
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines.append(values)
    return lines


def encode_line(values: Mapping[str, Any]) -> str:
    """One line of the file, with its line break; a number that isn't finite becomes null, since JSON has no NaN."""
    return json.dumps({key: plain(value) for key, value in values.items()}, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A JSON value: tensors and NumPy scalars as numbers, what isn't finite as null, other objects as text."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if isinstance(value, int | str | None) else str(value)
