"""The quickstart at several seeds: what each reached, and the mean. ``make pocket-study``.

Every seed trains its own SFT, reward, DPO and PPO from the shipped base and is evaluated on the same held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from chatalign.pipeline import run_pipeline

MEASURES = ("win_rate", "gold_mean", "accuracy", "format_rate", "kl")
TRAINED = ("sft", "reward", "dpo", "ppo")


def run_seed(recipe: str, folder: Path, seed: int) -> dict[str, Any]:
    """One run of the pipeline with every trained stage's seed set; returns its summary."""
    seeds = {f"{stage}.train.seed": seed for stage in TRAINED}
    return run_pipeline(recipe, seeds | {"output_dir": str(folder / f"seed-{seed}")})


def tabulate(summaries: dict[int, dict[str, Any]]) -> list[str]:
    """Markdown rows: each measure of each model by seed, with mean and standard deviation."""
    seeds = list(summaries)
    lines = [
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean ± sd |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    names = list(summaries[seeds[0]]["eval"])
    rows = [
        (f"{name} {measure}", lambda s, n=name, m=measure: s["eval"][n].get(m))
        for name in names
        for measure in MEASURES
    ]
    kinds = list(summaries[seeds[0]]["reward_model"])
    rows += [(f"reward model {kind}", lambda s, k=kind: s["reward_model"].get(k)) for kind in kinds if kind != "n"]
    for title, value_of in rows:
        values = [value_of(summaries[seed]) for seed in seeds]
        if any(not isinstance(value, int | float) for value in values):
            continue
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {title} | {cells} | {statistics.mean(values):.3f} ± {spread:.3f} |")
    return lines


def main() -> None:
    """Run the seeds, print the table, and write it beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/pocket-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    folder: Path = arguments.output_dir
    summaries = {seed: run_seed(arguments.recipe, folder, seed) for seed in arguments.seeds}
    (folder / "study.json").write_text(json.dumps(summaries, indent=2, ensure_ascii=False), "utf-8")
    table = "\n".join(tabulate(summaries))
    (folder / "study.md").write_text(table + "\n", "utf-8")
    print(table)


if __name__ == "__main__":
    main()
