"""PPO's section of RESULTS.md, from the lines of bench/run_ppo.py: bars, where the time goes, rollouts, memory.

The floor of a phase is PERF arithmetic over matrix products measured alone: prefill and decode once, scoring a pass a
role, the update a pass forward and backward an epoch for policy and for value function, one for both where the value
head reads the policy's hidden states. Shares are floor / measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import ppo_work

Result = dict[str, Any]
OURS = "chatalign"
# Work: the bar against TRL's fastest arm, and the works in which that arm may be.
BARS = {
    "equal": (1.5, ("equal",)),
    "unequal": (2.5, ("unequal",)),
    "lora": (4.0, ("lora", "unequal")),
    "lora-equal": (4.0, ("lora-equal", "equal")),
}
ROLLOUT_BAR, MEMORY_BAR = 3.0, 1.35
ROLES = 3  # reference, reward, value: the policy's own log-probabilities are the sampler's
PHASES = ("rollout", "scoring", "update")


def section(results: Sequence[Result]) -> list[str]:
    """The tables, a size after the other."""
    lines = ["| work | model | best arms | tokens a CPU second: ours / TRL 1.12 | replies | bar | memory | passes |"]
    lines.append("|---" * 8 + "|")
    sizes = sorted({r["model"] for r in results})
    for work in BARS:
        lines += [line for size in sizes if (line := bar_line(results, work, size))]
    lines += ["", *rollout_table(results, sizes), "", *memory_table(results, sizes), "", *phase_table(results, sizes)]
    return lines


def arms_of(results: Sequence[Result], size: str, works: Sequence[str], *, ours: bool) -> dict[str, list[Result]]:
    """Results by arm of one size, of us or of TRL, turns in order."""
    found: dict[str, list[Result]] = defaultdict(list)
    for r in in_turn(results, "ppo", size):
        if r["work"] in works and r["arm"].startswith(OURS) == ours:
            found[r["arm"]].append(r)
    return dict(found)


def in_turn(results: Sequence[Result], bench: str, size: str) -> list[Result]:
    """One kind of result of one size, turns in order."""
    return sorted((r for r in results if r["bench"] == bench and r["model"] == size), key=lambda r: r["repeat"])


def middle(runs: Sequence[Result], name: str = "items_per_cpu_s") -> float:
    """The median of what was measured."""
    return median(r[name] for r in runs)


def fastest(arms: dict[str, list[Result]]) -> str | None:
    """The arm with the highest median."""
    return max(arms, key=lambda arm: middle(arms[arm]), default=None)


def ratios(ours: Sequence[Result], theirs: Sequence[Result], name: str = "items_per_cpu_s") -> list[float]:
    """Ours over theirs, turn by turn."""
    them = {r["repeat"]: r[name] for r in theirs}
    return [r[name] / them[r["repeat"]] for r in ours if r["repeat"] in them]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, smallest to largest, and how many."""
    if not values:
        return "–"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f}, n {len(values)})"


def best_pair(results: Sequence[Result], work: str, size: str) -> tuple[list[Result], list[Result]] | None:
    """Our fastest arm on a work and TRL's; None where one of the two wasn't measured."""
    mine = arms_of(results, size, (work,), ours=True)
    theirs = arms_of(results, size, BARS[work][1], ours=False)
    ours, peer = fastest(mine), fastest(theirs)
    return None if ours is None or peer is None else (mine[ours], theirs[peer])


def bar_line(results: Sequence[Result], work: str, size: str) -> str | None:
    """One work's row."""
    if (pair := best_pair(results, work, size)) is None:
        return None
    ours, theirs = pair
    speed, replies = ratios(ours, theirs), ratios(ours, theirs, "replies_per_cpu_s")
    if not speed:
        return None
    bar = BARS[work][0]
    memory = middle(ours, "peak_mb") / middle(theirs, "peak_mb")
    return (
        f"| {work} | {size} | {ours[0]['arm']} / {theirs[0]['arm']} | {spread(speed)} × | {median(replies):.2f} × "
        f"| ≥ {bar} | {memory:.2f} | {'yes' if median(speed) >= bar else 'no'} |"
    )


def rollout_table(results: Sequence[Result], sizes: Sequence[str]) -> list[str]:
    """Useful tokens a second and memory of the ways to draw replies, by the precision that each is fastest at."""
    lines = ["| replies alone | model | useful tokens a CPU second | over `generate` | peak MB | bar | passes |"]
    lines.append("|---" * 7 + "|")
    for size in sizes:
        arms: dict[str, list[Result]] = defaultdict(list)
        for r in in_turn(results, "ppo-rollout", size):
            arms[r["arm"]].append(r)
        base = fastest({arm: runs for arm, runs in arms.items() if arm.startswith("generate-")})
        if base is None:
            continue
        for arm in sorted(arms, key=lambda arm: -middle(arms[arm])):
            over, peak = ratios(arms[arm], arms[base]), middle(arms[arm], "peak_mb")
            held = "– | –"
            if arm.startswith(OURS) and over:
                passed = median(over) >= ROLLOUT_BAR and peak < middle(arms[base], "peak_mb")
                held = f"≥ {ROLLOUT_BAR}, less memory | {'yes' if passed else 'no'}"
            speed = spread([r["items_per_cpu_s"] for r in arms[arm]], 0)
            lines.append(f"| {arm} | {size} | {speed} | {spread(over)} | {peak:.0f} | {held} |")
    return lines


def memory_table(results: Sequence[Result], sizes: Sequence[str]) -> list[str]:
    """Peak of LoRA PPO over that of LoRA SFT on a batch of as many rows and tokens."""
    lines = [
        "| LoRA PPO over LoRA SFT | model | peak MB: PPO / SFT | ratio | bar | passes |",
        "|---|---|---|---|---|---|",
    ]
    for size in sizes:
        sft = {r["dtype"]: r["peak_mb"] for r in results if r["bench"] == "ppo-memory" and r["model"] == size}
        for arm, runs in sorted(arms_of(results, size, ("lora-equal",), ours=True).items()):
            if (base := sft.get(runs[0]["dtype"])) is not None:
                peak = middle(runs, "peak_mb")
                passes = "yes" if peak / base <= MEMORY_BAR else "no"
                lines.append(
                    f"| {arm} | {size} | {peak:.0f} / {base:.0f} | {peak / base:.2f} | ≤ {MEMORY_BAR} | {passes} |"
                )
    return lines


def floor_s(result: Result, floor: Result) -> dict[str, float]:
    """CPU seconds that each phase of one rollout takes at least, by its tokens."""
    seconds = floor["s_a_token"]
    prompt, response = result["prompt_tokens"], result["tokens"] / result["iterations"]
    is_lora = result["work"].startswith("lora") and result["arm"].startswith(OURS)
    passes = 1 if "-shared-" in result["arm"] else 2
    return {
        "rollout": seconds["forward"] * prompt + seconds["decode"] * response,
        "scoring": ROLES * seconds["forward"] * (prompt + response),
        "update": ppo_work.EPOCHS * passes * seconds["lora" if is_lora else "full"] * (prompt + response),
    }


def phase_table(results: Sequence[Result], sizes: Sequence[str]) -> list[str]:
    """Where the time of a rollout and its update goes, in our fastest arm and TRL's, and each phase's share of it."""
    head = [f"{phase} s (floor / measured)" for phase in PHASES]
    lines = [f"| a rollout of {ppo_work.PROMPTS} | model | arm | {' | '.join(head)} |", "|---" * 6 + "|"]
    for work in BARS:
        for size in sizes:
            for runs in best_pair(results, work, size) or ():
                floors = [
                    r
                    for r in results
                    if r["bench"] == "ppo-floor" and r["model"] == size and r["dtype"] == runs[0]["dtype"]
                ]
                cells = []
                for phase in PHASES:
                    took = median(r["cpu_s"][phase] for r in runs)
                    share = [floor_s(r, floors[-1])[phase] / r["cpu_s"][phase] for r in runs] if floors else []
                    cells.append(f"{took:.2f}" + (f" ({100 * median(share):.0f} %)" if share else ""))
                lines.append(f"| {work} | {size} | {runs[0]['arm']} | {' | '.join(cells)} |")
    return lines
