"""The ``chatalign`` command: stages and ``schema`` straight away, all else through :mod:`chatalign.commands`.

typer and its pydantic adapters take a third of the time in which a misspelt key is refused, and the launcher reads a
stage's words in any case.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys

from chatalign.recipe.schema import SCHEMA_NAMES, STAGE_NAMES, schema_text


def print_schema(stage: str) -> None:
    """Print the JSON Schema of a stage's recipe, or of a pipeline; exit status 2 for a stage that there isn't."""
    if stage not in SCHEMA_NAMES:
        print(f"chatalign: `{stage}` is not a stage; give one of {', '.join(SCHEMA_NAMES)}", file=sys.stderr)
        raise SystemExit(2)
    print(schema_text(stage), end="")


def main() -> None:
    """The ``chatalign`` command."""
    gc.disable()  # until what a command needs is imported: imports make objects and no garbage
    atexit.register(gc.freeze)  # or the process's end would look through all modules once more
    # pydantic reads every installed package's metadata in search of plugins; none has a say in recipes.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    command, words = next(iter(sys.argv[1:]), ""), sys.argv[2:]
    if command in STAGE_NAMES and "--help" not in words:
        from chatalign.launch import stage_main

        stage_main(command, argv=words)
    if command == "schema" and not words[1:] and not any(word.startswith("-") for word in words):
        print_schema(*words or ["sft"])
        return
    from chatalign.commands import app

    gc.enable()
    app()


if __name__ == "__main__":
    main()
