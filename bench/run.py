"""Training side by side: ``python bench/run.py [--works ...] [--sizes ...] [--repeats N]``, part of ``make bench``.

Every arm is a process of its own, one thread, on the same model and rows. First each runs alone, then those that were
fastest step in turn, on one core, so that a busy second of the machine hits all of them: ratios are taken from these.
What is compared is process CPU time over the same steps. A result counts where its gradient is not zero and where its
loss on the probe rows is chatalign's, to 1e-4 in float32. Lines go to bench/results/training.jsonl, which
``bench/report.py`` turns into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import NamedTuple

import report
import workload
from processes import in_turn, run_process

ROOT = workload.ROOT
ARMS, VENVS = ROOT / "bench" / "arms", ROOT / "bench" / ".venvs"
RESULTS = ROOT / "bench" / "results" / "training.jsonl"
WORKS = ("sft", "sft-lora", "dpo-short", "dpo-long", "reward-short", "reward-long")
# Works whose arms step in turn together: LoRA is held against full fine-tuning too.
GROUPS = (("sft", "sft-lora"), *((work,) for work in WORKS[2:]))
BOTH = ("bfloat16", "float32")
# In float32 one batch has one loss; bf16 rounds in another order everywhere.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-3}


@dataclass(frozen=True)
class Arm:
    """A script, the environment that it runs in, and how it is set."""

    script: str
    peer: str | None  # None: ours, or the bare loop
    variant: str
    dtype: str

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.script.removesuffix('_arm').replace('_', '-')}-{self.variant}-{self.dtype}"

    @property
    def python(self) -> Path:
        """The interpreter of the arm's environment; ours has what chatalign requires, and no extra, as peers' have."""
        return VENVS / self.environment / "bin" / "python"

    @property
    def environment(self) -> str:
        """The folder in bench/.venvs."""
        return self.peer or "chatalign"


class Turn(NamedTuple):
    """One run of an arm."""

    repeat: int
    work: str
    arm: Arm


def precisions() -> tuple[str, ...]:
    """What arms run in by default: float32, and bf16 where the CPU has products in it (else 2.6 × float32's time)."""
    return BOTH if {"avx512_bf16", "amx_bf16"} & set(workload.wide_vectors()) else ("float32",)


def arms_of(work: str, both: tuple[str, ...] = BOTH) -> list[Arm]:
    """Of ours, the floor, and each peer as it comes and at its best, what is installed; the best in `both` precisions.

    Ours tuned is with ``train.torch_compile``, which makes the peers slower here: they compile the whole model, for
    each new length.
    """
    arms = [Arm("chatalign_arm", None, "default", dtype) for dtype in both]
    arms += [Arm("chatalign_arm", None, "tuned", dtype) for dtype in both]
    if work.startswith("sft"):
        arms += [Arm("floor", None, "default", dtype) for dtype in both]
    for script, peer in (("trl_arm", "trl"), ("llamafactory_arm", "llamafactory"), ("ms_swift_arm", "ms-swift")):
        arms.append(Arm(script, peer, "default", "bfloat16" if peer == "trl" else "float32"))
        arms += [Arm(script, peer, "tuned", dtype) for dtype in both]
    arms.append(Arm("axolotl_arm", "axolotl", "tuned", "float32"))
    return [arm for arm in arms if installed(arm)]


def installed(arm: Arm) -> bool:
    """Whether `bench/peers.py` got what this arm runs to import."""
    record = VENVS / arm.environment / "peer.json"
    return record.is_file() and json.loads(record.read_text()).get("reason") is None


def require_ours() -> None:
    """Stop where `bench/peers.py` has made no environment for chatalign: without its arms nothing is compared."""
    if not installed(Arm("chatalign_arm", None, "default", "float32")):
        raise SystemExit("chatalign has no environment under bench/.venvs: python bench/peers.py chatalign makes it")


def command(arm: Arm, work: str, size: str) -> list[str]:
    """What runs the arm, but for ``--out``."""
    parts = [arm.python, ARMS / f"{arm.script}.py", "--work", work, "--model", workload.model_folder(size, work)]
    parts += ["--rows", workload.rows_file(work), "--probe", workload.probe_file(work)]
    return list(map(str, [*parts, "--dtype", arm.dtype, "--variant", arm.variant]))


def run(arm: Arm, work: str, size: str, out: Path, core: int | None) -> dict | None:
    """One process alone; its result, or None with what it said where it failed."""
    return run_process([*command(arm, work, size), "--out", str(out)], arm.name, out, core)


def unlike(results: list[dict]) -> dict[str, str]:
    """The arms of one work whose loss on the probe rows is not chatalign's of the same precision, each with a line."""
    ours = {r["dtype"]: r["probe_loss"] for r in results if r["arm"].startswith("chatalign")}
    found = {}
    for r in results:
        if r["dtype"] in ours and abs(r["probe_loss"] - ours[r["dtype"]]) > SAME_LOSS[r["dtype"]]:
            found[r["arm"]] = f"{r['arm']} on {r['work']} {r['model']}: loss {r['probe_loss']:.6f}, "
            found[r["arm"]] += f"chatalign's {ours[r['dtype']]:.6f}"
    return found


def alone(works: list[str], repeats: int, names: tuple[str, ...], dtypes: tuple[str, ...]) -> Iterator[Turn]:
    """What runs alone, in order; a peer as it comes, which is never its best, once."""
    for repeat in range(repeats):
        for work in works:
            for arm in arms_of(work, dtypes):
                once = arm.variant == "default" and arm.peer is not None
                if arm.name.startswith(names) and not (repeat and once):
                    yield Turn(repeat, work, arm)


def leading(work: str, arms: list[Arm], results: list[dict]) -> list[list[Arm]]:
    """Of `arms`, by what they did alone: ours in the faster precision, the nearest peer, the floor, the next peer.

    Peers with another loss are left out. All of `arms`, where none ran alone.
    """
    results = [r for r in results if r["work"] == work]
    other_loss = unlike(results)
    of_work = report.by_arm([r for r in results if r["arm"] not in other_loss])
    ours, peers = report.nearest(of_work)
    if ours is None:
        return [arms]
    dtype = ours.rsplit("-", 1)[1]
    floors = sorted((name for name in of_work if name.startswith("floor")), key=lambda n: -report.speed(of_work[n]))
    named = [[name for name in of_work if name.startswith("chatalign") and name.endswith(dtype)]]
    named += [peers[:1], floors[:1], peers[1:2]]
    by_name = {arm.name: arm for arm in arms}
    return [[by_name[name] for name in names] for names in named]


def fitting(jobs: list[Turn], results: list[dict]) -> list[Turn]:
    """The first of `jobs` that fit into nine tenths of the free memory together, by their peaks alone."""
    peaks = {(r["work"], r["arm"]): r["peak_mb"] for r in results}
    room = 0.9 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / 1024
    fit = []
    for job in jobs:
        room -= peaks.get((job.work, job.arm.name), 0)
        if room > 0 or not fit:
            fit.append(job)
        else:
            print(f"  {job.work} {job.arm.name}: not in turn with the others, which leave it no memory", flush=True)
    return fit


def side_by_side(works: list[str], results: list[dict], names: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Turn]:
    """What steps in turn: the leading arms of `works`."""
    ranks = [leading(w, [a for a in arms_of(w, dtypes) if a.name.startswith(names)], results) for w in works]
    jobs = [
        Turn(0, work, arm)
        for rank in zip_longest(*ranks, fillvalue=[])
        for work, arms in zip(works, rank, strict=True)
        for arm in arms
    ]
    return fitting(jobs, results)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--sizes", nargs="+", choices=list(workload.SIZES), default=["7M"])
    parser.add_argument("--alone", type=int, default=1, help="how often every arm runs by itself, to find the fastest")
    parser.add_argument("--repeats", type=int, default=3, help="how often the fastest then step in turn")
    parser.add_argument("--arms", nargs="+", help="only arms whose name starts with one of these")
    parser.add_argument("--dtypes", nargs="+", choices=BOTH, default=precisions())
    parser.add_argument("--core", type=int, help="pin to this core")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def record(turn: Turn, result: dict | None, about: dict, out: Path) -> list[dict]:
    """Append what a run measured, with what is known about it; none where it failed."""
    if result is None:
        return []
    line = result | about | {"repeat": turn.repeat, "at": time.time()}
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    speed = f"{line['items_per_cpu_s']:.1f} a CPU second{', in turn' if 'in_turn' in line else ''}"
    print(f"{turn.work} {line['model']} {turn.arm.name}: {speed}, {line['peak_mb']:.0f} MB", flush=True)
    return [line]


def main() -> None:
    """Run what is asked for, and append each result as it comes."""
    args = parsed()
    require_ours()
    chosen = tuple(args.arms or [""]), tuple(args.dtypes)
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {"rows": workload.make(), "commit": commit}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = args.out.with_suffix(f".{os.getpid()}.line")
    shared_core = max(os.sched_getaffinity(0)) if args.core is None else args.core
    different: list[str] = []
    for size in args.sizes:
        found: list[dict] = []
        for turn in alone(args.works, args.alone, *chosen):
            found += record(turn, run(turn.arm, turn.work, size, scratch, args.core), about, args.out)
        for repeat, group in product(range(args.repeats), GROUPS):
            jobs = side_by_side([work for work in args.works if work in group], found, *chosen)
            results = in_turn([(job.arm.name, command(job.arm, job.work, size)) for job in jobs], shared_core)
            for job, result in zip(jobs, results, strict=True):
                found += record(job._replace(repeat=repeat), result, about | {"in_turn": True}, args.out)
        for work in args.works:
            different += unlike([result for result in found if result["work"] == work]).values()
    scratch.unlink(missing_ok=True)
    for line in different:
        print(f"not the same loss: {line}")


if __name__ == "__main__":
    main()
