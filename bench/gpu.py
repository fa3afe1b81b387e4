"""chatalign against TRL on one GPU, and each lever's own gain: one command, a table ready for bench/RESULTS.md.

    python bench/gpu.py                      everything, the most important first
    python bench/gpu.py --budget-s 540       what fits; the same command goes on where it stopped
    python bench/gpu.py --only sft,dpo --arms chatalign,trl
    python bench/gpu.py --device cpu --quick the same code with tiny models, as a test

Random-init models, random tokens, real length distributions. An arm is a process of its own; its result is appended
to --out as it ends, and an arm that is there already is not run again. All arms of a work start from the same
weights and must find one loss and one gradient norm on the same rows, else the table says so and the exit is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_work import OURS, QUICK, WORKS, Arm, Work, plan

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gpu.jsonl"
# Dense bf16 TFLOP/s by the vendor's data sheet; MFU is held against it.
NOMINAL = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0, "B200": 2250.0}
# Between arms in bfloat16 and float32 on one model: relative differences of the probe's loss and gradient norm.
LOSS_APART, NORM_APART = {"half": 2e-3, "full": 1e-5}, {"half": 5e-2, "full": 1e-4}
# What an arm of each size may take at most: start, compiling and steps. Also a guess of what the next one will take.
LIMIT_S = {"tiny": 120, "0.5B": 180, "1.2B": 240, "3.2B": 300, "8B": 400}
EXPLAINED = (
    "MFU = Σ (6 N t + 6 L d t²) over documents of t tokens (4 N with adapters), N weights that are multiplied with, "
    "the output layer too, L layers, d heads × head size, over the data sheet's bf16 peak. Start: imports and the "
    "making of model and trainer; first step: the probe and the first step after it, compiling included. Loss and "
    "gradient norm: on the same rows, before training."
)
Result = dict[str, Any]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps")
    parser.add_argument("--only", default="", help="works whose name starts with one of these, by commas")
    parser.add_argument("--arms", default="", help="arms whose name starts with one of these, by commas")
    parser.add_argument("--repeats", type=int, default=1, help="times round all arms, interleaved; medians are shown")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start no arm that may end later")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="print what would run, in order")
    return parser.parse_args(words)


def chosen(options: argparse.Namespace) -> list[tuple[Work, Arm]]:
    """The arms to run, in order, once."""
    installed = {name for name in ("trl", "liger_kernel", "bitsandbytes") if find_spec(name) is not None}
    for name in {"trl", "liger_kernel", "bitsandbytes"} - installed:
        print(f"{name} isn't installed: its arms are left out", file=sys.stderr)
    works, arms = ([part for part in text.split(",") if part] for text in (options.only, options.arms))
    return [
        (work, arm)
        for work, arm in plan(QUICK if options.quick else WORKS, device=options.device, installed=installed)
        if (not works or work.name.startswith(tuple(works))) and (not arms or arm.name.startswith(tuple(arms)))
    ]


def run_process(words: list[str], limit_s: float) -> Result:
    """The JSON object on the last line that gpu_arm.py prints, or what went wrong, by name."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "gpu_arm.py"), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=dict(os.environ) | environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit_s:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"error": (lines or ["no output"])[-1][:300]}
    last: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return last


def append(file: Path, result: Result) -> None:
    """One line more."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(result) + "\n")


def read(file: Path, device: str) -> list[Result]:
    """The results so far on this kind of device."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [result for result in map(json.loads, lines) if result.get("on") == device]


def run_all(options: argparse.Namespace) -> None:
    """Run what isn't done yet, in order of importance, for as long as the budget lasts."""
    started = time.perf_counter()
    done = read(options.out, options.device)
    if not any("gemm_tflops" in result for result in done):
        append(options.out, {"bench": "gpu", "on": options.device} | run_process(["--ceilings", options.device], 300))
    finished = {(r["work"], r["arm"], r["round"]) for r in done if "work" in r and "error" not in r}
    took: dict[str, float] = {}
    for number in range(options.repeats):
        for work, arm in chosen(options):
            if (work.name, arm.name, number) in finished:
                continue
            # The longest so far of this size is what the next may take.
            left = options.budget_s - (time.perf_counter() - started)
            if left < took.get(work.size, LIMIT_S[work.size] / 4):
                print(f"budget spent before {work.name}, {arm.name}", file=sys.stderr)
                return
            before = time.perf_counter()
            spec = {"work": asdict(work), "arm": asdict(arm), "device": options.device}
            found = run_process([json.dumps(spec)], min(LIMIT_S[work.size], left))
            seconds = time.perf_counter() - before
            took[work.size] = max(took.get(work.size, 0.0), seconds)
            line = {"bench": "gpu", "on": options.device, "work": work.name, "arm": arm.name, "round": number}
            append(options.out, line | {"metric": f"{work.unit}/s", "unit": work.unit, "wall_s": seconds} | found)
            shown = found.get("error") or f"{found['per_s']:,.1f} {work.unit}/s"
            print(f"{work.name:20} {arm.name:26} {shown}  ({seconds:.0f} s)", file=sys.stderr)


def by_arm(results: list[Result], work: str) -> dict[str, list[Result]]:
    """A work's results by arm, in the order in which they came; errors only where nothing else is there."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.get("work") == work:
            found.setdefault(result["arm"], []).append(result)
    return {arm: [r for r in rs if "error" not in r] or rs[-1:] for arm, rs in found.items()}


def apart(arms: dict[str, list[Result]], *, half: bool) -> list[str]:
    """Arms whose loss or gradient norm on the probe is not chatalign's; `half` where any computes in bfloat16."""
    precision = "half" if half else "full"
    ours = next((r for r in arms.get(OURS.name, []) if "error" not in r), None)
    if ours is None:
        return []
    found = []
    for arm, results in arms.items():
        for result in results:
            if "error" in result:
                continue
            loss, norm = (abs(result[k] / ours[k] - 1) for k in ("probe_loss", "probe_grad_norm"))
            if loss > LOSS_APART[precision] or norm > NORM_APART[precision]:
                found.append(f"{arm} (loss {loss:.1e}, gradient norm {norm:.1e} apart)")
                break
    return found


def median(results: list[Result], name: str) -> float | None:
    """The median over rounds, None where it wasn't measured."""
    values = [r[name] for r in results if name in r]
    return statistics.median(values) if values else None


def table(results: list[Result], work: Work, ceilings: Result) -> list[str]:
    """A work's section: speed, ratio to chatalign's default, MFU, memory, start, and the probe."""
    arms = by_arm(results, work.name)
    if not arms:
        return []
    ours = median(arms.get(OURS.name, []), "per_s")
    peers = [speed for arm, rs in arms.items() if arm.startswith("trl") and (speed := median(rs, "per_s"))]
    head = f"### {work.name}"
    if ours and peers:
        head += f": {ours / max(peers):.2f} × TRL's best arm"
    columns = (f"{work.unit}/s", "of chatalign", "MFU", "peak GB", "start s", "first step s", "loss", "gradient norm")
    lines = [head, "", f"| arm | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    nominal = next((peak for name, peak in NOMINAL.items() if name in ceilings.get("device", "")), None)
    for arm, rs in arms.items():
        if "error" in rs[0]:
            lines.append(f"| {arm} | failed: {rs[0]['error'].replace('|', '/')} | | | | | | | |")
            continue
        speed, flops, peak = (median(rs, name) for name in ("per_s", "model_tflops_per_s", "peak_gb"))
        cells = [
            arm,
            f"{speed:,.1f}" if work.unit == "pairs" else f"{speed:,.0f}",
            f"{speed / ours:.2f}" if ours and speed else "",
            f"{100 * flops / nominal:.1f} %" if flops and nominal else "",
            f"{peak:.1f}" if peak else "",
            f"{median(rs, 'built_s'):.1f}",
            f"{median(rs, 'to_first_step_s') - median(rs, 'built_s'):.1f}",
            f"{median(rs, 'probe_loss'):.5f}",
            f"{median(rs, 'probe_grad_norm'):.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = next((r["note"] for r in arms.get(OURS.name, []) if r.get("note")), None)
    return [*lines, "", *([f"chatalign ran with {notes}.", ""] if notes else [])]


def report(results: list[Result], works: dict[str, Work], device: str) -> tuple[str, list[str]]:
    """The markdown, and every arm that doesn't agree with the others."""
    ceilings = next((r for r in results if "gemm_tflops" in r), {})
    lines = ["## On a GPU" if device == "cuda" else "## gpu.py on a CPU (tiny models: a test, no measurement)", ""]
    if ceilings:
        lines.append(
            f"{ceilings['device']}, torch {ceilings['torch']}; ceilings measured in the same session: "
            f"{ceilings['gemm_tflops']:,.0f} TFLOP/s (bf16 matrix product), {ceilings['copy_tb_per_s']:.2f} TB/s "
            f"(copy). {EXPLAINED}"
        )
        lines.append("")
    wrong = []
    for work in works.values():
        lines += table(results, work, ceilings)
        half = device == "cuda" or work.tuning == "qlora"
        wrong += [f"{work.name}: {arm}" for arm in apart(by_arm(results, work.name), half=half)]
    if wrong:
        lines += ["**Not the same computation:** " + "; ".join(wrong), ""]
    return "\n".join(lines), wrong


def main(words: list[str] | None = None) -> int:
    """Run and print; 1 where arms disagree."""
    options = arguments(words)
    if options.list:
        for work, arm in chosen(options):
            print(f"{work.name:20} {arm.name}")
        return 0
    run_all(options)
    text, wrong = report(read(options.out, options.device), QUICK if options.quick else WORKS, options.device)
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
