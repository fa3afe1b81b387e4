"""What differs between a run as it began and as it is asked for now, key by key, and what of it a checkpoint carries.

A key is a recipe's own (``train.learning_rate``), or stands below the one that names a file or a model: ``.contents``
of rows, functions, templates; ``.weights`` of a model; ``.run`` of an input that is a run. Two more are ``chatalign``,
the version, and ``processes``. Light: no torch here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from chatalign.inputs import NOT_IN_FINGERPRINT

Settings = Mapping[str, Any]
PROCESSES = "processes"
_SHOWN = 60  # characters of a value in a message
_LISTED = 12  # keys in a message


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key with what it was and what it is; None where it wasn't, or isn't, there. `of` names a file."""

    key: str
    before: Any
    now: Any
    of: str | None = None

    def __str__(self) -> str:
        of = f" ({self.of})" if self.of else ""
        return f"{self.key}{of}: {shown(self.before)} → {shown(self.now)}"

    def as_json(self) -> dict[str, Any]:
        """What ``run.json`` keeps."""
        return asdict(self)


def shown(value: Any) -> str:
    """A value in few characters; a text without quotes."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def changes_between(before: Settings, now: Settings) -> list[Change]:
    """Every key in which two values of :func:`inputs.run_inputs` differ, the recipe's first."""
    found = [_with_runs(change, before, now) for change in _differences(before["recipe"], now["recipe"], "")]
    for role in sorted(before["parents"].keys() | now["parents"].keys()):
        one, other = before["parents"].get(role), now["parents"].get(role)
        if (one or {}).get("fingerprint") != (other or {}).get("fingerprint"):
            key = f"{_key_of(role, now['recipe'])}.run"
            found.append(Change(key=key, before=_run(one), now=_run(other)))
    for name in sorted(before["models"].keys() | now["models"].keys()):
        one, other = before["models"].get(name), now["models"].get(name)
        key = _key_of(name, (now if name in now["models"] else before)["recipe"])
        is_file = key.endswith("_path")
        if one != other and not (is_file and None in (one, other)):  # another path is the recipe's change
            of, key = (name, f"{key}.contents") if is_file else (None, f"{key}.weights")
            found.append(Change(key=key, before=_sha256(one), now=_sha256(other), of=of))
    for name in ("data", "functions"):
        was = {read["key"]: read["sha256"] for read in before[name]}
        for read in now[name]:
            if was.get(read["key"], read["sha256"]) != read["sha256"]:
                key, before_it = f"{read['key']}.contents", was[read["key"]]
                found.append(Change(key=key, before=_sha256(before_it), now=_sha256(read["sha256"]), of=read["path"]))
    if before["chatalign"] != now["chatalign"]:
        found.append(Change(key="chatalign", before=before["chatalign"], now=now["chatalign"]))
    return found


def recipe_changes(before: Settings, now: Settings) -> Iterator[Change]:
    """The keys in which two whole recipes differ, but for those that change nothing in what a run makes."""
    for change in _differences(before, now, ""):
        if not any(covers(name, change.key) for name in NOT_IN_FINGERPRINT):
            yield change


def _differences(before: Any, now: Any, key: str) -> Iterator[Change]:
    """Dotted keys of two recipes; entries of a list of sections by their number."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in [*before, *(name for name in now if name not in before)]:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif _is_sections(before) and _is_sections(now):
        for i in range(max(len(before), len(now))):
            one, other = (sections[i] if i < len(sections) else None for sections in (before, now))
            yield from _differences(one, other, f"{key}.{i}")
    elif before != now:
        yield Change(key=key, before=before, now=now)


def _is_sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)


def _key_of(name: str, settings: Settings) -> str:
    """Where a recipe names a model: by its role, or a template's or tokenizer's path."""
    if name.startswith("reward_") and name.removeprefix("reward_").isdigit():
        return f"ppo.rewards.{name.removeprefix('reward_')}"
    sections = {role: settings.get(role) for role in ("model", "reward_model", "value_model")}
    sections |= {f"models.{model}": section for model, section in (settings.get("models") or {}).items()}
    for key, section in sections.items():
        for field in ("chat_template_path", "tokenizer_name_or_path"):
            if (section or {}).get(field) == name:
                return f"{key}.{field}"
    return f"models.{name}" if f"models.{name}" in sections else name


def _with_runs(change: Change, before: Settings, now: Settings) -> Change:
    """A change of a model's path, with the run in the place of the role that inputs hold where a run was taken."""
    of_path = change.key.removesuffix(".name_or_path")
    if of_path == change.key:
        return change
    role = of_path.removeprefix("models.")
    runs = [_run(inputs["parents"].get(role)) for inputs in (before, now)]
    return replace(change, before=runs[0] or change.before, now=runs[1] or change.now)


def _run(parent: Settings | None) -> str | None:
    return f"run {parent['run_id']} ({parent['fingerprint'][:12]})" if parent else None


def _sha256(content: str | None) -> str | None:
    return f"sha256 {content[:12]}" if content and len(content) == 64 else content


def covers(named: str, key: str) -> bool:
    """Whether a key is the named one, or stands below it."""
    return key == named or key.startswith(f"{named}.")


def not_named(changes: Sequence[Change], named: Collection[str]) -> list[Change]:
    """The changes that none of the named keys covers."""
    return [change for change in changes if not any(covers(name, change.key) for name in named)]


def listed(changes: Sequence[Change], reasons: Mapping[str, str]) -> str:
    """A line a change, each with the reason why a checkpoint can't carry it, where there is one."""
    lines = [f"{change}{f' – {reasons[change.key]}' if change.key in reasons else ''}" for change in changes[:_LISTED]]
    more = [f"and {len(changes) - _LISTED} more"] if len(changes) > _LISTED else []
    return "".join(f"\n  {line}" for line in [*lines, *more])
