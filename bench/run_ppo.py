"""PPO side by side: ``python bench/run_ppo.py [--works ...] [--sizes ...] [--repeats N]``, part of ``make bench``.

Beside TRL 1.12, the last release with a PPOTrainer, on the same models, prompts, temperature, epochs and optimizer
steps, one thread, arms in turn. ``equal``: prompts of 72 tokens, replies of 64; ``unequal``: prompts as they are, and
replies end at the end of turn; ``lora``: the same, our roles as adapters of one backbone, TRL's at its best (whole
models, from ``unequal``, or its LoRA policy); ``lora-equal``: that at equal lengths. Then rollouts alone, memory beside
LoRA SFT, and the floor. After the first turn, arms slower than SLOWEST of the fastest on their side stay out.
A result counts where both make as many optimizer steps, the gradient is not zero, the KL of the first rollout is 0,
and scores, log-probabilities and values of the probe's replies agree. Lines go to bench/results/ppo.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ppo_work
import run
import workload
from ppo_harness import WORKS, lengths_of

RESULTS = workload.ROOT / "bench" / "results" / "ppo.jsonl"
PARTS = (*WORKS, "rollout", "memory", "floor")
PROBED = ("scores", "logps", "ref_logps", "values")
# TRL's frozen models are bf16 throughout, where a logit of 16 is rounded by up to 0.06.
SAME = {"float32": 1e-4, "bfloat16": 0.1}
FIRST_KL = {"float32": 1e-4, "bfloat16": 5e-2}  # nats a reply
SLOWEST = 0.85


@dataclass(frozen=True)
class Job:
    """An arm on one part; `iterations` are timed after a warm one."""

    part: str
    arm: run.Arm
    iterations: int


def jobs_of(part: str, dtypes: tuple[str, ...] = run.BOTH) -> list[Job]:
    """Ours first, then whom we are held against."""

    def jobs(script: str, peer: str | None, variants: tuple[str, ...], iterations: int) -> list[Job]:
        return [Job(part, run.Arm(script, peer, v, dtype), iterations) for v in variants for dtype in dtypes]

    if part == "floor":
        return jobs("ppo_floor", None, ("default",), 1)
    if part == "rollout":
        return jobs("rollout_arm", None, ("chatalign", "generate", "static", "continuous"), 3)
    if part == "memory":
        return jobs("ppo_sft_arm", None, ("default",), 1)
    is_lora = part.startswith("lora")
    ours = jobs("chatalign_ppo_arm", None, ("default", "shared") if is_lora else ("default", "micro"), 2)
    theirs = jobs("trl_ppo_arm", "trl-ppo", ("peft",) if is_lora else ("default", "micro"), 1)
    return [job for job in [*ours, *theirs] if run.installed(job.arm)]


def key(job: Job) -> str:
    """As the tables name the arm."""
    alone = {"rollout": job.arm.variant, "floor": "floor", "memory": "chatalign-sft-lora"}
    who = alone.get(job.part) or f"{'trl' if job.arm.peer else 'chatalign'}-{job.arm.variant}"
    return f"{who}-{job.arm.dtype}"


def goes_on(job: Job, results: list[dict]) -> bool:
    """Whether an arm is among the fastest of its side so far, ours or theirs; floor and memory are measured once."""
    if job.part not in WORKS:
        return job.part == "rollout"
    speeds: dict[str, float] = {}
    for r in results:
        if r.get("work") == job.part and r["arm"].startswith("chatalign") == key(job).startswith("chatalign"):
            speeds[r["arm"]] = max(speeds.get(r["arm"], 0.0), r["items_per_cpu_s"])
    return not speeds or speeds.get(key(job), 0.0) >= SLOWEST * max(speeds.values())


def run_job(job: Job, size: str, out: Path, core: int | None) -> dict | None:
    """One process; its result, or None with what it said where it failed."""
    work = job.part if job.part in WORKS else "equal" if job.part == "memory" else "unequal"
    command = [job.arm.python, run.ARMS / f"{job.arm.script}.py", "--work", work, "--size", size, "--out", out]
    command += ["--dtype", job.arm.dtype, "--variant", job.arm.variant, "--iterations", job.iterations]
    return run.run_process(list(map(str, command)), key(job), out, core)


def check_parity(results: list[dict]) -> list[str]:
    """Arms of one size whose numbers on the probe are not ours, or whose first rollout is off its reference."""
    ours = {(r["work"], r["dtype"]): r["probe"] for r in results if r["arm"].startswith("chatalign-default")}
    found: dict[tuple[str, str], str] = {}
    for r in results:
        who = f"{r['arm']} on {r['work']} {r['model']}"
        if abs(r["first"]["kl"]) > FIRST_KL[r["dtype"]]:
            found[who, "kl"] = f"{who}: KL of the first rollout {r['first']['kl']:.5f}"
        own = ours.get((r["work"], r["dtype"]))
        if own is None:
            continue
        for name in PROBED:
            if name == "values" and r["arm"].startswith("chatalign-shared"):
                continue  # a value head that starts at 0
            apart = max(abs(a - b) for a, b in zip(own[name], r["probe"][name], strict=True))
            if apart > SAME[r["dtype"]]:
                found[who, name] = f"{who}: {name} of the probe {apart:.1e} apart"
    return list(found.values())


def main() -> None:
    """Run what is asked for, arms in turn, and append each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=list(workload.SIZES), default=["3.4M", "7M"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="only arms whose name starts with one of these")
    parser.add_argument("--dtypes", nargs="+", choices=run.BOTH, default=run.precisions())
    parser.add_argument("--iterations", type=int, help="timed ones in place of two of ours for one of TRL's")
    parser.add_argument("--core", type=int, help="pin to this core")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    run.require_ours()
    dtypes = tuple(args.dtypes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = args.out.with_suffix(f".{time.time_ns()}.line")
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, cwd=workload.ROOT).stdout.strip()
    different: list[str] = []
    for size in args.sizes:
        for lengths in sorted({lengths_of(part) for part in args.works if part in WORKS} | {"equal", "unequal"}):
            ppo_work.make(size, lengths)
        results: list[dict] = []
        order = itertools.product(range(args.repeats), (job for part in args.works for job in jobs_of(part, dtypes)))
        for repeat, job in order:
            if not key(job).startswith(tuple(args.arms or [""])) or (repeat and not goes_on(job, results)):
                continue
            job = replace(job, iterations=args.iterations or job.iterations)
            result = run_job(job, size, scratch, args.core)
            if result is None:
                continue
            result |= {"repeat": repeat, "at": time.time(), "commit": commit}
            results.append(result)
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            speed = f"{result['items_per_cpu_s']:.1f} tokens a CPU second" if "items_per_cpu_s" in result else "done"
            print(f"{job.part} {size} {result['arm']}: {speed}, {result.get('peak_mb', 0):.0f} MB", flush=True)
        different += check_parity([r for r in results if r["bench"] == "ppo"])
    scratch.unlink(missing_ok=True)
    for line in different:
        print(f"not the same: {line}")


if __name__ == "__main__":
    main()
