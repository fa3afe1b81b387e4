"""Imports run downward only, and what must be light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "chatalign"
LAYERS = [
    {"errors", "maths", "__init__"},
    {
        "recipe",
        "artifact",
        "checkpoint",
        "inputs",
        "changes",
        "carry",
        "unfinished",
        "runs",
        "metrics_file",
        "phases",
        "forked",
    },
    {"data", "models", "engine", "rollout", "tracking"},
    {
        "sft",
        "reward",
        "dpo",
        "ppo",
        "pretrain",
        "kto",
        "evaluate",
        "hub",
        "merge",
        "report",
        "chat",
        "verify",
        "preview",
    },
    {
        "launch",
        "check",
        "preflight",
        "permits",
        "pipeline",
        "beside",
        "side_by_side",
        "summary",
        "sweep",
        "warm",
        "commands",
        "cli",
        "__main__",
    },
]
STAGES = {"sft", "reward", "dpo", "ppo", "pretrain", "kto", "evaluate"}
LIGHT = (
    "errors",
    "recipe",
    "artifact",
    "runs",
    "launch",
    "check",
    "preflight",
    "pipeline",
    "cli",
    "commands",
    "data.checks",
)
LIGHT += ("warm", "phases", "forked", "beside", "side_by_side", "summary", "sweep", "verify", "unfinished", "permits")
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def layer_of(room: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if room in layer)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path, *, with_lazy: bool) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = ast.walk(tree) if with_lazy else iter(tree.body)
    rooms = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chatalign"):
            parts = (node.module or "").split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return {room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()}


def test_every_room_has_a_layer() -> None:
    rooms = {room_of(path) for path in MODULES}
    assert rooms <= set().union(*LAYERS), "a new room needs a place in LAYERS"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_downward(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # its public names are imported on first use
    # `main()` of a stage hands itself to launch, lazily: the one upward step, and no import at load time.
    upward = {name for name in imported_rooms(path, with_lazy=True) if layer_of(name) > layer_of(room)}
    assert upward <= {"launch"}, f"{room} imports upward: {upward}"
    assert "launch" not in imported_rooms(path, with_lazy=False) or layer_of(room) == len(LAYERS) - 1
    if room in STAGES:
        others = imported_rooms(path, with_lazy=True) & STAGES - {room}
        assert not others, f"stage {room} imports stages {others}"


def test_maths_knows_no_model_and_no_recipe() -> None:
    for path in (PACKAGE / "maths").rglob("*.py"):
        assert imported_rooms(path, with_lazy=True) <= {"maths", "errors"}, path
        assert "transformers" not in path.read_text("utf-8"), path


@pytest.mark.parametrize("heavy", ["torch", "transformers"])
def test_light_modules_import_nothing_heavy(heavy: str) -> None:
    imports = ";".join(f"import chatalign.{name}" for name in LIGHT)
    code = f"import sys;{imports};sys.exit('{heavy}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
