"""Raw results to what a person reads: ``python bench/report.py`` writes bench/RESULTS.md and bench/results.png.

Of another kind of machine: ``python bench/report.py --notes NOTES_x.md --out RESULTS_x.md``.

Ratios are taken between runs that stepped in turn (where there are none, that followed each other), then their median,
with the smallest and the largest beside it. The best peer arm is the one nearest to ours, whatever its precision.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import ppo_report
import workload

ROOT = workload.ROOT
RAW = ROOT / "bench" / "results"
NOTES = ROOT / "bench" / "NOTES.md"
Result = dict[str, Any]
OURS, FLOOR = "chatalign", "floor"
# Work: (bar, goal) against the best peer arm, speed; and the bar of peak memory.
BARS = {
    "sft": (1.3, 1.6),
    "sft-lora": (1.3, 1.5),
    "dpo-short": (3.0, 4.5),
    "dpo-long": (3.0, 4.5),
    "reward-short": (2.2, 3.0),
    "reward-long": (2.2, 3.0),
}
LORA_BAR = (1.3, 1.5)  # over our own full fine-tuning
# Part of bench/data_prep.py: (bar, goal) against the best peer arm.
DATA_BARS = {"cpu": (2.0, 4.0), "wall": (3.0, 4.0), "pairs": (2.0, 4.0)}
DATA_PARTS = {"cpu": "rows, a core", "wall": "rows, 4 workers by the clock", "pairs": "pairs, a core"}
# Metric of bench/startup.py: what must be below it, the bar, the goal; a ratio is to `trl sft`.
LIGHT, LIGHT_BAR, FIRST_STEP_BAR, CHAIN_BAR = "startup/light", (0.3, 0.15), (0.6, 0.4), (15, 8)
FLAT = 1.1  # the memory that the most rows may take, over what the fewest do
MEMORY_BARS = {"sft": 0.8, "sft-lora": 1.0, "dpo-short": 0.6, "dpo-long": 0.6, "reward-short": 1.0, "reward-long": 1.0}


def read(name: str) -> list[Result]:
    """The lines of one raw file; none where it wasn't measured."""
    file = RAW / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of one work and size by arm, turns in order."""
    arms = defaultdict(list)
    for result in sorted(results, key=lambda r: r["repeat"]):
        arms[result["arm"]].append(result)
    return dict(arms)


def speed(results: Sequence[Result]) -> float:
    """The median of items a CPU second, of runs in turn where there are any."""
    in_turn = [r for r in results if r.get("in_turn")]
    return median(r["items_per_cpu_s"] for r in in_turn or results)


def nearest(arms: dict[str, list[Result]]) -> tuple[str | None, list[str]]:
    """The fastest of our arms, and the peers' by how near they come to it, turn by turn, the nearest first.

    Not by their medians: one that only ran in quiet turns would seem faster than it is.
    """
    ours = max((name for name in arms if name.startswith(OURS)), key=lambda name: speed(arms[name]), default=None)
    if ours is None:
        return None, []
    peers = {
        name: (not any(r.get("in_turn") for r in arms[name]), median(found))  # those that stepped in turn first
        for name in arms
        if not name.startswith((OURS, FLOOR)) and (found := ratios(arms[ours], arms[name]))
    }
    return ours, sorted(peers, key=peers.__getitem__)


def best(arms: dict[str, list[Result]]) -> tuple[str, str] | None:
    """The fastest of our arms, and of the peers' the one that comes nearest to it."""
    ours, peers = nearest(arms)
    return (ours, peers[0]) if ours is not None and peers else None


def ratios(ours: Sequence[Result], theirs: Sequence[Result]) -> list[float]:
    """Ours over theirs, turn by turn: of the runs in which they stepped in turn, else of those one after the other."""
    for in_turn in (True, False):
        mine, them = (
            {r["repeat"]: r["items_per_cpu_s"] for r in runs if r.get("in_turn", False) == in_turn}
            for runs in (ours, theirs)
        )
        if common := mine.keys() & them.keys():
            return [mine[repeat] / them[repeat] for repeat in sorted(common)]
    return []


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and smallest to largest."""
    if not values:
        return "–"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def training_tables(results: Sequence[Result]) -> list[str]:
    """The table of bars, and one table a work with all its arms."""
    groups = defaultdict(list)
    for result in results:
        groups[result["work"], result["model"]].append(result)
    head = [
        "| work | model | best arms | speed: ours / peer | bar, goal | over the floor | memory: ours / peer | bar "
        "| passes |"
    ]
    head.append("|---" * 9 + "|")
    tables: list[str] = []
    order = {work: i for i, work in enumerate(BARS)}
    for (work, size), group in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        arms = by_arm(group)
        if (pair := best(arms)) is None:
            continue
        ours, peer = pair
        floors = [name for name in arms if name.startswith(FLOOR)]
        floor = max(floors, key=lambda name: speed(arms[name]), default=None)
        bar, goal = BARS[work]
        memory = median(r["peak_mb"] for r in arms[ours]) / median(r["peak_mb"] for r in arms[peer])
        faster, over = ratios(arms[ours], arms[peer]), ratios(arms[ours], arms[floor]) if floor else []
        fails = [
            name for name, short in (("speed", median(faster) < bar), ("floor", over and median(over) < 0.9)) if short
        ]
        fails += ["memory"] if memory > MEMORY_BARS[work] else []
        head.append(
            f"| {work} | {size} | {ours} / {peer} | {spread(faster)} × | ≥ {bar}, {goal} | {spread(over)} "
            f"| {memory:.2f} | ≤ {MEMORY_BARS[work]} | {'all but ' + ' and '.join(fails) if fails else 'yes'} |"
        )
        tables += arms_table(work, size, arms)
    return [*head, *lora_lines(groups), *tables]


def lora_lines(groups: dict[tuple[str, str], list[Result]]) -> list[str]:
    """LoRA over our own full fine-tuning, by size and precision."""
    lines: list[str] = []
    for size in sorted({size for work, size in groups if work == "sft-lora"}):
        full, lora = (by_arm(groups.get((work, size), [])) for work in ("sft", "sft-lora"))
        for arm in sorted(name for name in lora if name.startswith(OURS) and name in full):
            over = spread(ratios(lora[arm], full[arm]))
            lines.append(f"| {size} | {arm} | {over} × | ≥ {LORA_BAR[0]}, {LORA_BAR[1]} |")
    return ["", "| model | LoRA over full, ours | speed | bar, goal |", "|---|---|---|---|", *lines] if lines else []


def arms_table(work: str, size: str, arms: dict[str, list[Result]]) -> list[str]:
    """Every arm of a work: speed, memory, and the loss and gradient norm on the probe rows."""
    unit = "tokens" if work.startswith("sft") else "pairs"
    lines = ["", f"### {work}, {size}", ""]
    lines.append(f"| arm | {unit} a CPU second | peak MB | probe loss | gradient norm | runs in turn, alone |")
    lines.append("|---|---|---|---|---|---|")
    for name in sorted(arms, key=lambda name: -speed(arms[name])):
        runs = arms[name]
        in_turn = [r for r in runs if r.get("in_turn")]
        memory = median(r["peak_mb"] for r in runs)
        rates = spread([r["items_per_cpu_s"] for r in in_turn or runs], 0 if unit == "tokens" else 1)
        lines.append(
            f"| {name} | {rates} | {memory:.0f} | {runs[0]['probe_loss']:.5f} | {runs[0]['probe_grad_norm']:.4f} "
            f"| {len(in_turn)}, {len(runs) - len(in_turn)} |"
        )
    return lines


def metric_table(results: Sequence[Result]) -> list[str]:
    """Arm by metric, the median and spread of what was measured."""
    cells = defaultdict(list)
    for r in results:
        cells[r["bench"], r["arm"], r["metric"], r.get("unit", "")].append(float(r["value"]))
    lines = ["| bench | arm | metric | median (smallest–largest) | n |", "|---|---|---|---|---|"]
    for (bench, arm, metric, unit), values in cells.items():
        digits = 3 if unit == "s" else 0
        lines.append(f"| {bench} | {arm} | {metric} | {spread(values, digits)} {unit} | {len(values)} |")
    return lines


def startup_table(results: Sequence[Result]) -> list[str]:
    """What starts, by its bar: medians by the clock."""
    walls, rows = defaultdict(list), []
    for r in results:
        if r["metric"] in ("wall_s", "overhead_s"):
            walls[r["bench"], r["arm"], r["metric"]].append(float(r["value"]))
    for (bench, arm, metric), values in walls.items():
        if bench == LIGHT and arm.startswith(OURS):
            rows.append((arm, values, "s", LIGHT_BAR))
        elif metric == "overhead_s":
            rows.append((f"{arm}: beside its loops", values, "s", CHAIN_BAR))
    first = [walls.get(("startup/first-step", arm, "wall_s"), []) for arm in ("chatalign sft", "trl sft")]
    if all(first):
        over = [ours / theirs for ours, theirs in zip(*first, strict=False)]
        rows.append(("start to first step, over `trl sft`", over, "×", FIRST_STEP_BAR))
    lines = ["| what | median (smallest–largest) | bar, goal | passes |", "|---|---|---|---|"]
    for name, values, unit, (bar, goal) in rows:
        passes = "yes" if median(values) <= bar else "no"
        lines.append(f"| {name} | {spread(values)} {unit} | ≤ {bar}, {goal} | {passes} |")
    return [*lines, ""]


def data_tables(results: Sequence[Result]) -> list[str]:
    """Data preparation: each of our arms by its bar, every arm's speed, and memory by rows."""
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    memory: dict[str, dict[int, float]] = defaultdict(dict)
    for r in results:
        if r["metric"] == "peak_mb":
            memory[r["arm"]][r["rows"]] = r["value"]
        elif not r["fresh"]:
            speeds[r["metric"].removesuffix("_tokens_per_s")][r["arm"]].append(r["value"])
    head = ["| work | arm / best peer arm | tokens/s: ours / peer | bar, goal | passes |", "|---|---|---|---|---|"]
    tail = ["", "| work | arm | tokens/s, median (smallest–largest) | n |", "|---|---|---|---|"]
    for part, arms in sorted(speeds.items(), key=lambda item: list(DATA_BARS).index(item[0])):
        median_of = {arm: median(turns) for arm, turns in arms.items()}
        peer = max((arm for arm in arms if arm.startswith("trl")), key=median_of.__getitem__, default=None)
        for ours in (arm for arm in arms if peer and arm.startswith(OURS)):
            over = [mine / theirs for mine, theirs in zip(arms[ours], arms[peer], strict=False)]
            bar, goal = DATA_BARS[part]
            passes = "yes" if median(over) >= bar else "no"
            head.append(f"| {DATA_PARTS[part]} | {ours} / {peer} | {spread(over)} × | ≥ {bar}, {goal} | {passes} |")
        for arm in sorted(arms, key=lambda arm: -median_of[arm]):
            tail.append(f"| {DATA_PARTS[part]} | {arm} | {spread(arms[arm], 0)} | {len(arms[arm])} |")
    return [*head, *tail, *memory_table(memory)]


def memory_table(memory: dict[str, dict[int, float]]) -> list[str]:
    """Peak memory of each arm by rows, and what the most rows take over the fewest."""
    if not memory:
        return []
    counts = sorted({rows for peaks in memory.values() for rows in peaks})
    lines = ["", f"| peak MB of | {' | '.join(f'{rows:,} rows' for rows in counts)} | most / fewest | bar | passes |"]
    lines.append("|---" * (len(counts) + 4) + "|")
    for arm, peaks in memory.items():
        grown = peaks[max(peaks)] / peaks[min(peaks)]
        cells = " | ".join(f"{peaks[rows]:,.0f}" if rows in peaks else "–" for rows in counts)
        bar = f"≤ {FLAT} | {'yes' if grown <= FLAT else 'no'}" if arm.startswith(OURS) else "– | –"
        lines.append(f"| {arm} | {cells} | {grown:.2f} | {bar} |")
    return lines


def machine() -> str:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model = next((x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), model)
    wide = ", ".join(workload.wide_vectors()) or "no wide vectors"
    return f"{model}, {os.cpu_count()} cores ({wide}), {platform.system()}"


def versions(results: Sequence[Result]) -> list[str]:
    """Of each arm, as it reported them."""
    seen = {}
    for r in results:
        who = r["arm"].rsplit("-", 2)[0]
        seen[who] = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
    return [f"- {who}: {what}" for who, what in sorted(seen.items())]


def peers_that_are_not_here() -> list[str]:
    """Peers that `bench/peers.py` could not install or import, with its reason."""
    found = []
    for record in sorted((ROOT / "bench" / ".venvs").glob("*/peer.json")):
        peer = json.loads(record.read_text())
        if peer.get("reason"):
            found.append(f"- {peer['recipe']['requirement']}: {peer['reason']}")
    return found


def plot(results: Sequence[Result], file: Path) -> None:
    """Speed of every arm over the best peer arm's, a panel a work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = defaultdict(list)
    for r in results:
        groups[r["work"], r["model"]].append(r)
    panels = sorted(groups)
    figure, axes = plt.subplots(-(-len(panels) // 3), min(3, len(panels)), figsize=(15, 3.4 * -(-len(panels) // 3)))
    for axis, key in zip(getattr(axes, "flat", [axes]), panels, strict=False):
        arms = by_arm(groups[key])
        if (pair := best(arms)) is None:
            continue
        over = {name: median(found) for name in arms if (found := ratios(arms[name], arms[pair[1]]))}
        names = sorted(over, key=over.__getitem__)
        values = [over[name] for name in names]
        colours = ["#d95f02" if n.startswith(OURS) else "#999999" if n.startswith(FLOOR) else "#7570b3" for n in names]
        axis.barh(names, values, color=colours)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.axvline(BARS[key[0]][0], color="#d95f02", linewidth=0.8, linestyle="--")
        axis.set_title(f"{key[0]}, {key[1]}: × the best peer arm (dashed: the bar)", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Write both files from what was measured so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=Path, default=NOTES, help="what is said before the tables")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "RESULTS.md", help="the plot goes beside it")
    args = parser.parse_args()
    picture = args.out.with_name(f"{args.out.stem.lower()}.png")
    training = read("training")
    lines = ["# What was measured", "", f"{date.today()}. {machine()}.", ""]
    lines += [args.notes.read_text().strip(), ""] if args.notes.is_file() else []
    if training:
        plot(training, picture)
        commits = ", ".join(sorted({r["commit"] for r in training}))
        lines += [
            "## Training, one thread, process CPU time",
            "",
            f"Rows: {training[-1]['rows']}; commit {commits}.",
            "",
        ]
        lines += training_tables(training)
        lines += ["", f"![Speed of every arm over the best peer's]({picture.name})", ""]
    if found := read("ppo"):
        commits = ", ".join(sorted({r["commit"] for r in found}))
        lines += ["## PPO, one thread, process CPU time", "", f"Commit {commits}; 64 prompts a rollout, 4 epochs.", ""]
        lines += [*ppo_report.section(found), ""]
    if found := read("data_prep"):
        lines += ["## Data preparation", "", *data_tables(found), ""]
    if found := read("startup"):
        lines += ["## Start-up and chains", "", *startup_table(found), *metric_table(found), ""]
    if args.out.with_name("scaling.png").is_file() and args.notes == NOTES:
        lines += ["## How cost grows", "", "![Cost against rows, length, vocabulary, size, processes](scaling.png)", ""]
    lines += ["## Versions", "", *versions(training), ""]
    if absent := peers_that_are_not_here():
        lines += ["Not measured, since they don't run here:", "", *absent]
    args.out.write_text("\n".join(lines).rstrip() + "\n")
    print(args.out, file=sys.stderr)


if __name__ == "__main__":
    main()
