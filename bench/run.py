"""Training side by side: ``python bench/run.py [--works ...] [--sizes ...] [--repeats N]``, part of ``make bench``.

Every arm is a process of its own, one thread, on the same model and rows; the arms of all works take turns
(A-B-C-A-B-C), so that a busy minute of the machine hits all. What is compared is process CPU time over the same steps.
A result counts where its gradient is not zero and where its loss on the probe rows is chatalign's, to 1e-4 in float32.
Lines go to bench/results/training.jsonl, which ``bench/report.py`` turns into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import workload

ROOT = workload.ROOT
ARMS, VENVS = ROOT / "bench" / "arms", ROOT / "bench" / ".venvs"
RESULTS = ROOT / "bench" / "results" / "training.jsonl"
WORKS = ("sft", "sft-lora", "dpo-short", "dpo-long", "reward-short", "reward-long")
BOTH = ("bfloat16", "float32")
TIME_LIMIT_S = 900
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


def run(arm: Arm, work: str, size: str, out: Path, core: int | None) -> dict | None:
    """One process; its result, or None with what it said where it failed."""
    command = [arm.python, ARMS / f"{arm.script}.py", "--work", work, "--model", workload.model_folder(size, work)]
    command += ["--rows", workload.rows_file(work), "--probe", workload.probe_file(work), "--out", out]
    command += ["--dtype", arm.dtype, "--variant", arm.variant]
    return run_process(list(map(str, command)), arm.name, out, core)


def run_process(command: list[str], name: str, out: Path, core: int | None) -> dict | None:
    """A command of one thread that writes its result to `out`; None, with what it said, where it failed."""
    single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | single | {"HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "disabled"}
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    out.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [*pinned, *command], env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        print(f"  {name}: no end after {TIME_LIMIT_S} s", flush=True)
        return None
    if done.returncode or not out.is_file():
        print(f"  {name}: {(done.stderr.strip().splitlines() or ['ended without a result'])[-1][:200]}", flush=True)
        return None
    return json.loads(out.read_text()) | {"arm": name}


def check_parity(results: list[dict]) -> list[str]:
    """The arms of one work whose loss on the probe rows is not chatalign's, where it ran in the same precision."""
    ours = {r["dtype"]: r["probe_loss"] for r in results if r["arm"].startswith("chatalign")}
    found = {}
    for r in results:
        if r["dtype"] in ours and abs(r["probe_loss"] - ours[r["dtype"]]) > SAME_LOSS[r["dtype"]]:
            found[r["arm"]] = f"{r['arm']} on {r['work']} {r['model']}: loss {r['probe_loss']:.6f}, "
            found[r["arm"]] += f"chatalign's {ours[r['dtype']]:.6f}"
    return list(found.values())


def turns(
    works: list[str], repeats: int, names: tuple[str, ...], dtypes: tuple[str, ...]
) -> Iterator[tuple[int, str, Arm]]:
    """(repeat, work, arm) in the order they run; a peer as it comes, which is never its best, once."""
    for repeat in range(repeats):
        for work in works:
            for arm in arms_of(work, dtypes):
                once = arm.variant == "default" and arm.peer is not None
                if arm.name.startswith(names) and not (repeat and once):
                    yield repeat, work, arm


def main() -> None:
    """Run what is asked for, arms in turn, and append each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--sizes", nargs="+", choices=list(workload.SIZES), default=["7M"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="only arms whose name starts with one of these")
    parser.add_argument("--dtypes", nargs="+", choices=BOTH, default=precisions())
    parser.add_argument("--core", type=int, help="pin to this core")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    require_ours()
    source = workload.make()
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = args.out.with_suffix(f".{os.getpid()}.line")
    different: list[str] = []
    for size in args.sizes:
        results: dict[str, list[dict]] = {work: [] for work in args.works}
        for repeat, work, arm in turns(args.works, args.repeats, tuple(args.arms or [""]), tuple(args.dtypes)):
            result = run(arm, work, size, scratch, args.core)
            if result is None:
                continue
            result |= {"repeat": repeat, "rows": source, "at": time.time(), "commit": commit}
            results[work].append(result)
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            speed = f"{result['items_per_cpu_s']:.1f} a CPU second"
            print(f"{work} {size} {arm.name}: {speed}, {result['peak_mb']:.0f} MB", flush=True)
        different += [line for of_work in results.values() for line in check_parity(of_work)]
    scratch.unlink(missing_ok=True)
    for line in different:
        print(f"not the same loss: {line}")


if __name__ == "__main__":
    main()
