"""How a stage starts: ``chatalign sft RECIPE key=value`` and ``accelerate launch -m chatalign.sft …`` both end here.

Exit status: 0 done (or already finished), 2 refused or failed with one line, 130 interrupted after saving.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from chatalign.engine.signals import breaking_off
from chatalign.errors import ChatalignError, HubError, Interrupted, RecipeError
from chatalign.phases import LOOPS, account, open_account, overhead, phase
from chatalign.recipe import load_recipe, parse_overrides

if TYPE_CHECKING:
    from chatalign.artifact import Artifact
    from chatalign.check import LookedAt
    from chatalign.recipe import Recipe

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

RunFunction = Callable[[Any], "Artifact"]


def quiet_libraries() -> None:
    """Settings that hold for every command, made before the libraries read them."""
    import logging

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("transformers", "peft", "torch"):  # deprecations are for us to follow, not for the user to read
        warnings.filterwarnings("ignore", category=FutureWarning, module=name)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it regrets a kernel at each import


def stage_main(stage: str, run: RunFunction | None = None, argv: Sequence[str] | None = None) -> NoReturn:
    """``python -m chatalign.STAGE RECIPE [key=value ...] [options]``; ends the process.

    `run` is what trains, the stage's own module where it isn't given, imported once the recipe is accepted.
    """
    arguments, allow = take_option("--allow-change", sys.argv[1:] if argv is None else argv)
    flags = {name for name in ("--force", "--traceback") if name in arguments}
    words = [word for word in arguments if word not in flags]
    usage = f"usage: chatalign {stage} RECIPE [key=value ...] [--force] [--allow-change KEY] [--traceback]"
    if not words or words[0].startswith("-"):
        print(usage, file=sys.stderr if words and words[0] not in ("-h", "--help") else sys.stdout)
        raise SystemExit(0 if words and words[0] in ("-h", "--help") else EXIT_REFUSED)

    def work() -> None:
        with breaking_off():
            execute(stage, run or run_imported, words[0], words[1:], force="--force" in flags, allow_change=allow)

    raise SystemExit(guarded(work, show_traceback="--traceback" in flags))


def run_imported(recipe: Recipe) -> Artifact:
    """Import a recipe's stage, and run it."""
    gc.enable()  # off since the command began
    from chatalign.pipeline import run_stage

    return run_stage(recipe)


def take_option(name: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words without every ``NAME VALUE`` and ``NAME=VALUE``, and the values."""
    rest, values = [], []
    given = iter(words)
    for word in given:
        option, equals, value = word.partition("=")
        if option == name:
            values.append(value if equals else next(given, ""))
        else:
            rest.append(word)
    return rest, values


def allowed_keys(given: Sequence[str], *, force: bool) -> list[str]:
    """The keys of every ``--allow-change A,B``; raises RecipeError where one names none, or beside ``--force``."""
    keys = [[key.strip() for key in listed.split(",") if key.strip()] for listed in given]
    if not all(keys):
        raise RecipeError("--allow-change: name what may change, as in --allow-change train.learning_rate")
    if keys and force:
        raise RecipeError("--force begins anew and --allow-change goes on with a run: give one of the two")
    return [key for listed in keys for key in listed]


def execute(
    stage: str,
    run: RunFunction,
    path: str,
    overrides: Sequence[str],
    *,
    force: bool = False,
    allow_change: Sequence[str] = (),
) -> None:
    """Load the recipe and run the stage, unless the same run is finished already and `force` is off.

    `allow_change` names keys that may have changed since an unfinished run was begun, which then goes on.
    """
    open_account()
    allow = allowed_keys(allow_change, force=force)
    with phase("check"):
        recipe = load_recipe(path, parse_overrides(overrides), stage=stage)
        from chatalign.runs import finished, locked  # not needed to refuse a recipe

        refuse_launch(recipe)
        quiet_libraries()
        if not force and (done := finished(recipe)) is not None:
            say(f"{recipe.output_dir}: already finished (run {done.run_id}); --force runs it again")
            catch_up(recipe)
            return
        refuse_problems(recipe)
    with locked(recipe.output_dir):
        with phase("check"):
            make_way(recipe, force=force, allow=allow)
        artifact = run(recipe)
        say(f"{recipe.output_dir}: finished in {artifact.wall_s:.0f} s (run {artifact.run_id})")
        hand_out(recipe)
    say(f"{recipe.output_dir}: {around(account())}")
    if stage == "eval":
        from rich.console import Console

        from chatalign.report import print_evaluation

        print_evaluation(recipe.output_dir, Console())


def make_way(recipe: Recipe, *, force: bool, allow: Sequence[str]) -> None:
    """Refuse an unfinished run of other inputs, or have it go on or moved aside as asked; every process calls it."""
    from chatalign.runs import is_main_process, world_size
    from chatalign.unfinished import judged, settle

    if is_main_process():
        if line := settle(recipe, processes=world_size(), force=force, allow=allow):
            say(line)
    elif not force:  # so that all end where one does: a launcher waits half a minute for the others
        judged(recipe, processes=world_size(), allow=allow)


def around(seconds: Mapping[str, float]) -> str:
    """What a stage took beside its loops, in words: ``5.1 s beside training (import 4.0, data 0.4, …)``."""
    parts = [f"{name} {spent:.1f}" for name, spent in seconds.items() if name not in LOOPS and spent >= 0.05]
    return f"{overhead(seconds):.1f} s beside training ({', '.join(parts) or 'nothing long'})"


@phase("report")
def hand_out(recipe: Recipe, report: Callable[[str], None] | None = None) -> None:
    """Upload a finished run where the recipe asks, and write its report; a Hub that is down leaves that for later.

    `report` is who writes it, where not this process, given the run's folder.
    """
    from chatalign.runs import is_main_process

    if is_main_process():
        _upload(recipe)
        (report or write_report)(recipe.output_dir)  # last: a run without it was killed in here


def write_report(folder: str) -> None:
    """Write a finished run's report, and say where."""
    from chatalign.report import write_run_report

    say(f"report: {write_run_report(folder)}")


def catch_up(recipe: Recipe) -> None:
    """Hand a finished run out where that was cut off, or where its upload still waits."""
    from chatalign.report.run_report import REPORT_FILE
    from chatalign.runs import locked

    if (Path(recipe.output_dir) / REPORT_FILE).is_file():
        _upload(recipe, only_waiting=True)
        return
    with locked(recipe.output_dir):
        hand_out(recipe)


def _upload(recipe: Recipe, *, only_waiting: bool = False) -> None:
    """Push a finished run where its recipe asks for it; `only_waiting`: where the Hub didn't take it before."""
    hub = getattr(recipe, "hub", None)
    if hub is None or not hub.push:
        return
    from chatalign.hub import pending, push

    if only_waiting and not pending(recipe.output_dir):
        return
    try:
        say(f"pushed: {push(recipe.output_dir, hub.repo, private=hub.private)}")
    except HubError as error:
        again = f"`chatalign push --pending {recipe.output_dir}`"
        print(f"chatalign: not pushed: {error}; the run is finished and kept, {again} uploads it", file=sys.stderr)


def refuse_problems(
    recipe: Recipe, *, made_later: frozenset[str] = frozenset(), looked_at: LookedAt | None = None
) -> None:
    """Raise for the first problem that ``chatalign check`` finds without a model; see :func:`check.check_recipe`."""
    from chatalign.check import refuse_first
    from chatalign.runs import is_main_process

    if is_main_process():
        refuse_first(recipe, made_later=made_later, looked_at=looked_at)


def refuse_launch(recipe: Recipe) -> None:
    """Raise GuardError where the launcher of this process does otherwise than it was told, or than the recipe says."""
    from chatalign.check.launch import gpus_here, launch_of_environment, launch_problems

    if recipe.stage == "eval":
        return
    for problem in launch_problems(recipe, launch_of_environment(), gpus=gpus_here()):
        raise problem


def guarded(work: Callable[[], None], *, show_traceback: bool = False) -> int:
    """Run `work`; turn an error of ours into one line on stderr and the exit status that it has."""
    try:
        work()
    except ChatalignError as error:
        if show_traceback:
            import traceback

            traceback.print_exc()
        print(f"chatalign: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED if isinstance(error, Interrupted) else EXIT_REFUSED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where, why = error.filename or "the disk", os.strerror(error.errno)
        again = "make some, and run the same command, which goes on where it was"
        print(f"chatalign: {where}: no room is left ({why}); {again}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt as error:
        again = "the same command goes on"
        print(f"chatalign: {error or 'SIGINT'}: interrupted; {again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def say(line: str) -> None:
    """One line for the person at the terminal, from the main process only."""
    from chatalign.runs import is_main_process

    if is_main_process():
        print(line, flush=True)
