"""The ``chatalign`` command: a stage goes straight to its launcher, all else through :mod:`chatalign.commands`.

typer and its pydantic adapters cost as much time as all the rest of refusing a misspelt key, and the launcher reads a
stage's words in any case.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

STAGE_COMMANDS = ("pretrain", "sft", "reward", "dpo", "ppo", "kto", "eval")


def launch_stage(stage: str, words: Sequence[str]) -> NoReturn:
    """``RECIPE [key=value ...] [--force] [--traceback]`` of one stage; ends the process."""
    from chatalign.launch import stage_main

    def run(recipe: Any) -> Any:
        from chatalign.pipeline import run_stage

        return run_stage(recipe)

    stage_main(stage, run, words)


def main() -> None:
    """The ``chatalign`` command."""
    command, words = sys.argv[1:2], sys.argv[2:]
    if command and command[0] in STAGE_COMMANDS and "--help" not in words:
        launch_stage(command[0], words)
    from chatalign.commands import app

    app()


if __name__ == "__main__":
    main()
