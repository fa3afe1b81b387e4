"""What a start costs: light commands, the way to the first optimizer step, and a chain's time beside its loops.

    python bench/startup.py [light] [first-step] [chain] [--repeats N] [--full]

Wall and CPU seconds of whole processes, one thread, arms in turn (A-B-A-B): ``chatalign`` beside ``trl`` of the same
environment. ``first-step`` ends both processes at their first optimizer step, by a hook that a ``sitecustomize``
installs; caches of rows are fresh in every run. ``chain`` runs recipes/quickstart.yaml shortened, ``--full`` as it
is. Lines go to bench/results/startup.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RESULTS = ROOT / "bench" / "results" / "startup.jsonl"
MODEL, ROWS = ROOT / "data/pocket/base", ROOT / "data/pocket/sft.jsonl"
PARTS = ("light", "first-step", "chain")
SHORT = [
    *(f"{stage}.train.max_steps=20" for stage in ("sft", "reward", "dpo")),
    "ppo.ppo.total_episodes=768",
    *(f"eval.eval.{rows}.max_rows=96" for rows in ("prompts", "pairs")),
]
# The process that steps first writes when it did and ends there, so that what its parent counts is the way to it.
HOOK = '''
import os, sys, time
from importlib.abc import MetaPathFinder

class Watch(MetaPathFinder):
    """Once transformers' Trainer is about to be imported torch is there, and its optimizers can be told."""

    def find_spec(self, name, path=None, target=None):
        if name == "transformers.trainer":
            sys.meta_path.remove(self)
            from torch.optim.optimizer import register_optimizer_step_post_hook
            register_optimizer_step_post_hook(stepped)

def stepped(*_):
    with open(os.environ["FIRST_STEP"], "w") as file:
        file.write(str(time.time()))
    os._exit(0)

sys.meta_path.insert(0, Watch())
'''


class Spent(NamedTuple):
    """Seconds of one process and its children."""

    wall: float
    cpu: float


def environment(**more: str) -> dict[str, str]:
    """One thread, no network; chatalign's own bytecode is kept, as that of an installed package is."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | offline | {"OMP_NUM_THREADS": "1"} | more


def spend(command: list[str], *, expect: int = 0, stamp: Path | None = None, **more: str) -> Spent:
    """Run a command to its end, or to the time that it writes into `stamp`; raises where it ends otherwise."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, clock = time.time(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, check=False)
    wall = time.perf_counter() - clock
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expect or (stamp is not None and not stamp.is_file()):
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    if stamp is not None:
        wall = float(stamp.read_text()) - started
    return Spent(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def light(repeats: int) -> None:
    """``--help``, ``schema``, a misspelt key and a wrong value, beside a bare Python and ``trl --help``."""
    chatalign, trl = str(BIN / "chatalign"), str(BIN / "trl")
    arms: dict[str, Callable[[], Spent]] = {
        "python -c pass": lambda: spend([sys.executable, "-c", "pass"]),
        "chatalign --help": lambda: spend([chatalign, "--help"]),
        "chatalign schema": lambda: spend([chatalign, "schema"]),
        "chatalign sft, a misspelt key": lambda: spend(
            [chatalign, "sft", "recipes/sft.yaml", "train.learning_rat=1"], expect=2
        ),
        "chatalign sft, a wrong value": lambda: spend(
            [chatalign, "sft", "recipes/sft.yaml", "train.learning_rate=fast"], expect=2
        ),
        "trl --help": lambda: spend([trl, "--help"]),
    }
    measure("light", arms, repeats, against="trl --help")


def first_step(repeats: int) -> None:
    """``chatalign sft`` and ``trl sft`` from nothing to their first optimizer step, on the pocket base and rows."""

    def arm(command: list[str], output: str) -> Spent:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "hook").mkdir()
            (folder / "hook" / "sitecustomize.py").write_text(HOOK)
            (folder / "rows").mkdir()
            shutil.copy(ROWS, folder / "rows" / "rows.jsonl")
            filled = [word.replace("{}", name) for word in [*command, output]]
            caches = {"HF_DATASETS_CACHE": f"{name}/datasets", "XDG_CACHE_HOME": f"{name}/cache"}
            stamp = folder / "stepped"
            return spend(filled, stamp=stamp, PYTHONPATH=f"{name}/hook", FIRST_STEP=str(stamp), **caches)

    ours = ["recipes/pocket/sft.yaml", f"model.name_or_path={MODEL}", "data.datasets.0.path={}/rows/rows.jsonl"]
    theirs = ["--model_name_or_path", str(MODEL), "--dataset_name", "{}/rows", "--use_cpu", "--report_to", "none"]
    arms: dict[str, Callable[[], Spent]] = {
        "chatalign sft": lambda: arm([str(BIN / "chatalign"), "sft", *ours], "output_dir={}/run"),
        "trl sft": lambda: arm([str(BIN / "trl"), "sft", *theirs], "--output_dir={}/run"),
    }
    measure("first-step", arms, repeats, against="trl sft")


def chain(repeats: int, *, full: bool) -> None:
    """The quickstart in one process: its wall time, and what of it was no loop of training or scoring.

    Rows are prepared in the first turn and read from the cache in the others.
    """
    with tempfile.TemporaryDirectory() as name:
        for turn in range(repeats):
            words = ["run", "recipes/quickstart.yaml", f"output_dir={name}/{turn}", *([] if full else SHORT)]
            spent = spend([str(BIN / "chatalign"), *words], HF_DATASETS_CACHE=f"{name}/datasets")
            summary = json.loads(Path(name, str(turn), "summary.json").read_text("utf-8"))
            phases: dict[str, float] = {}
            for row in summary["stages"]:
                for phase, seconds in row["seconds"].items():
                    phases[phase] = phases.get(phase, 0.0) + seconds
            loops = phases.pop("train", 0.0) + phases.pop("score", 0.0)
            rest = spent.wall - loops
            arm = f"quickstart{'' if full else ', shortened'}, rows {'cached' if turn else 'new'}"
            record("chain", arm, wall_s=spent.wall, cpu_s=spent.cpu, loops_s=loops, overhead_s=rest)
            parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items())
            print(f"{arm}: {spent.wall:.1f} s wall, {loops:.1f} in loops, {rest:.1f} beside them ({parts})", flush=True)


def measure(bench: str, arms: dict[str, Callable[[], Spent]], repeats: int, *, against: str) -> None:
    """Run all arms in turn, `repeats` times after one that warms the disk; print medians, ranges and ratios."""
    for run in arms.values():
        run()
    found: dict[str, list[Spent]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, run in arms.items():
            spent = run()
            found[arm].append(spent)
            record(bench, arm, wall_s=spent.wall, cpu_s=spent.cpu)
    print(f"{bench}: medians of {repeats} (lowest-highest), seconds; ratio to {against}")
    for arm, runs in found.items():
        cells = []
        for kind in ("wall", "cpu"):
            values = [getattr(spent, kind) for spent in runs]
            peer = median(getattr(spent, kind) for spent in found[against])
            cells.append(
                f"{kind} {median(values):6.3f} ({min(values):.3f}-{max(values):.3f}) {median(values) / peer:.2f}x"
            )
        print(f"  {arm:32} {'   '.join(cells)}", flush=True)


def record(bench: str, arm: str, **values: float) -> None:
    """Append one line a value to the results."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        for metric, value in values.items():
            line = {"bench": f"startup/{bench}", "arm": arm, "metric": metric, "value": round(value, 4), "unit": "s"}
            file.write(json.dumps(line | {"load": os.getloadavg()[0], "time": int(time.time())}) + "\n")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; without a part named, all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--full", action="store_true", help="the quickstart as it is")
    given = parser.parse_args(words)
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]} is no part; name any of {', '.join(PARTS)}")
    given.parts = given.parts or list(PARTS)
    return given


def main() -> None:
    """Measure what was asked for."""
    given = parsed()
    if "light" in given.parts:
        light(given.repeats or 7)
    if "first-step" in given.parts:
        first_step(given.repeats or 3)
    if "chain" in given.parts:
        chain(given.repeats or (1 if given.full else 3), full=given.full)


if __name__ == "__main__":
    main()
