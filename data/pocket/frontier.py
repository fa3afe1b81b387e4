"""PPO beside DPO and best-of-n: what they win for a nat of KL, and PPO without a KL penalty. ``make pocket-frontier``.

Every seed trains one SFT and one reward model, which all of its runs share. Finished runs are skipped, so the command
goes on where it was stopped. What was measured is in the results file, and the figures are made from that alone.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontier_report import Point, add_results, read_results, write_figures, write_table

from chatalign.pipeline import STAGE_MODULES, run_stage
from chatalign.recipe import Recipe, load_recipe
from chatalign.runs import finished, locked
from chatalign.warm import as_if_alone, import_once

RECIPES = Path("recipes/pocket")
HELD_OUT = Path("data/pocket/heldout.jsonl")
KL_COEFS = (0.02, 0.05, 0.1, 0.2)
DPO_BETAS = (0.03, 0.1, 0.3)
BEST_OF = (2, 4, 8, 16, 32)
BEST_OF_PROMPTS = 360  # at most: of each there are 32 replies
# The optimiser let loose, to show what the KL penalty is for. Policies are kept at every second rollout.
NO_PENALTY = {
    "ppo.kl_coef": 0.0,
    "ppo.total_episodes": 3072,
    "train.learning_rate": 1e-3,
    "train.lr_scheduler_type": "constant_with_warmup",
    "train.save_steps": 12,
    "train.save_total_limit": None,
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where the runs of one seed lie, and how many held-out prompts they are measured on."""

    folder: Path
    seed: int
    prompts: int

    def trained(self, stage: str, name: str, **overrides: Any) -> Path:
        """The folder of a finished run of a pocket recipe, trained where it isn't there yet."""
        inputs: dict[str, Any] = {"output_dir": str(self.folder / name), "train.seed": self.seed}
        if stage != "sft":
            inputs["model.name_or_path"] = str(self.folder / "sft")
        if stage == "ppo":
            inputs["reward_model.name_or_path"] = str(self.folder / "reward")
        bring_up_to_date(load_recipe(RECIPES / f"{stage}.yaml", inputs | overrides, stage=stage))
        return self.folder / name

    def evaluated(self, name: str, models: Mapping[str, Path], **overrides: Any) -> Path:
        """The folder of a finished evaluation of `models` beside SFT."""
        places = {"sft": self.folder / "sft", **models}
        inputs = {
            "output_dir": str(self.folder / name),
            "models": {model: {"name_or_path": str(place)} for model, place in places.items()},
            "reward_model.name_or_path": str(self.folder / "reward"),
            "eval.prompts.max_rows": self.prompts,
            "eval.pairs": None,
        }
        bring_up_to_date(load_recipe(RECIPES / "eval.yaml", inputs | overrides, stage="eval"))
        return self.folder / name


def bring_up_to_date(recipe: Recipe) -> None:
    """Run a stage, unless exactly this run is finished; one that was stopped goes on."""
    if finished(recipe) is not None:
        return
    print(recipe.output_dir, flush=True)
    import_once(STAGE_MODULES[recipe.stage])
    with locked(recipe.output_dir), as_if_alone():
        run_stage(recipe)


def measure_ppo(study: Study) -> list[Point]:
    """PPO by its recipe at each KL coefficient."""
    runs = {kl_coef: study.trained("ppo", f"ppo-{kl_coef}", **{"ppo.kl_coef": kl_coef}) for kl_coef in KL_COEFS}
    return points(study, "ppo", study.evaluated("eval-ppo", named(runs)))


def measure_dpo(study: Study) -> list[Point]:
    """DPO by its recipe at each β."""
    runs = {beta: study.trained("dpo", f"dpo-{beta}", **{"dpo.beta": beta}) for beta in DPO_BETAS}
    return points(study, "dpo", study.evaluated("eval-dpo", named(runs)))


def measure_no_penalty(study: Study) -> list[Point]:
    """PPO without a KL penalty, at its checkpoints."""
    run = study.trained("ppo", "no-penalty", **NO_PENALTY)
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").glob("checkpoint-*"))
    policies = {step: policy_at(run, step, study.folder / "no-penalty-policies" / str(step)) for step in steps}
    return points(study, "no_penalty", study.evaluated("eval-no-penalty", named(policies)))


def measure_best_of(study: Study) -> list[Point]:
    """Best-of-n of SFT's replies by the reward model, from the same draws for every n."""
    draws = max(BEST_OF)
    prompts = min(study.prompts, BEST_OF_PROMPTS)
    lines = HELD_OUT.read_text("utf-8").splitlines(keepends=True)[:prompts]
    repeated = study.folder / f"heldout-times-{draws}.jsonl"
    repeated.write_text("".join(line for line in lines for _ in range(draws)), "utf-8")
    source = {"eval.prompts": {"path": str(repeated)}, "eval.prompts.max_rows": None}
    drawn = replies(study.evaluated("eval-best-of", {}, **source, **{"eval.seed": 1}), "sft")
    baseline = replies(study.evaluated("eval-sft", {}), "sft")[:prompts]
    groups = [drawn[start : start + draws] for start in range(0, len(drawn), draws)]
    return [best_of_point(study.seed, n, groups, baseline) for n in BEST_OF]


def named(runs: Mapping[float, Path]) -> dict[str, Path]:
    """An evaluation's models, each by its setting."""
    return {f"{setting:g}": place for setting, place in runs.items()}


def policy_at(run: Path, step: int, folder: Path) -> Path:
    """The policy of a full model's PPO run at a checkpoint, as a model folder: the finished one with other weights.

    Raises ValueError where the checkpoint's policy has other weights than the finished model.
    """
    from safetensors.torch import load_file, save_file

    from chatalign.engine.weights import TRAINABLE_FILE

    saved = load_file(run / "checkpoints" / f"checkpoint-{step}" / TRAINABLE_FILE)
    weights = {name.removeprefix("policy."): w for name, w in saved.items() if name.startswith("policy.")}
    if weights.keys() != load_file(run / "model" / "model.safetensors").keys():
        raise ValueError(
            f"{run}: checkpoint-{step} holds other weights than the finished model; is it an adapter's run?"
        )
    shutil.copytree(run / "model", folder, dirs_exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def points(study: Study, method: str, evaluation: Path) -> list[Point]:
    """The points of an evaluation's models, and SFT's own."""
    models = json.loads((evaluation / "eval.json").read_text("utf-8"))["models"]
    sft_scores = [reply["rm_score"] for reply in replies(evaluation, "sft")]
    mean, deviation = statistics.fmean(sft_scores), statistics.pstdev(sft_scores)
    return [
        Point(
            method="sft" if name == "sft" else method,
            setting=0.0 if name == "sft" else float(name),
            seed=study.seed,
            kl=row["kl"],
            win_rate=0.5 if name == "sft" else row["win_rate"],
            gold=row["gold_mean"],
            accuracy=row["accuracy"],
            format_rate=row["format_rate"],
            ideal=row["gold_parts"]["ideal"],
            score=(row["rm_score"] - mean) / deviation,
        )
        for name, row in models.items()
    ]


def replies(evaluation: Path, model: str) -> list[dict[str, Any]]:
    """One model's replies with their scores, in the order of the prompts."""
    lines = (evaluation / "replies.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["replies"][model] for line in lines]


def best_of_point(
    seed: int, n: int, groups: Sequence[Sequence[dict[str, Any]]], baseline: Sequence[dict[str, Any]]
) -> Point:
    """Best-of-n from the N draws of each prompt, against SFT's one reply to it (`baseline`)."""
    sft_scores = [reply["rm_score"] for reply in baseline]
    mean, deviation = statistics.fmean(sft_scores), statistics.pstdev(sft_scores)
    totals = dict.fromkeys(("win_rate", "gold", "accuracy", "format_rate", "ideal", "score"), 0.0)
    for draws, rival in zip(groups, baseline, strict=True):
        for weight, reply in zip(best_of_weights([draw["rm_score"] for draw in draws], n), draws, strict=True):
            parts = reply["gold_parts"]
            totals["win_rate"] += weight * (
                0.5 + 0.5 * ((reply["gold"] > rival["gold"]) - (reply["gold"] < rival["gold"]))
            )
            totals["gold"] += weight * reply["gold"]
            totals["accuracy"] += weight * parts["correct"]
            totals["format_rate"] += weight * parts["format"]
            totals["ideal"] += weight * parts["ideal"]
            totals["score"] += weight * (reply["rm_score"] - mean) / deviation
    measured = {name: total / len(groups) for name, total in totals.items()}
    return Point(method="best_of_n", setting=float(n), seed=seed, kl=best_of_kl(n), **measured)


def best_of_weights(scores: Sequence[float], n: int) -> list[float]:
    """For each of N draws, the probability that it is the best-scored of n drawn from them without replacement.

    A mean under these weights is the unbiased estimate of best-of-n (Nakano et al., 2112.09332, appendix I). Of equal
    scores, which are nearly always equal replies, the later counts as better. Raises ValueError unless 1 ≤ n ≤ N.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"best of {n} from {len(scores)} draws; n lies between 1 and the number of draws")
    weights = [0.0] * len(scores)
    for rank, place in enumerate(sorted(range(len(scores)), key=scores.__getitem__)):
        weights[place] = math.comb(rank, n - 1) / math.comb(len(scores), n)
    return weights


def best_of_kl(n: int) -> float:
    """An upper bound of KL(best-of-n‖policy) in nats, log n − (n − 1)/n (Beirami et al., 2401.01879)."""
    return math.log(n) - (n - 1) / n


MEASURES = (measure_ppo, measure_no_penalty, measure_best_of, measure_dpo)


def measured(folder: Path, seeds: Sequence[int], prompts: int) -> Iterator[list[Point]]:
    """The points of each method and seed, method by method."""
    studies = [Study(folder=folder / f"seed-{seed}", seed=seed, prompts=prompts) for seed in seeds]
    for measure in MEASURES:
        for study in studies:
            study.trained("sft", "sft")
            study.trained("reward", "reward")
            yield measure(study)


def main() -> None:
    """Run what isn't finished, write results and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/pocket-frontier"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: only the figures again")
    parser.add_argument("--prompts", type=int, default=720, help="held-out prompts that each policy answers")
    parser.add_argument("--results", type=Path, default=Path("data/pocket/frontier.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/ppo.md"), help="has the table; figures go beside it")
    arguments = parser.parse_args()
    for new in measured(arguments.output_dir, arguments.seeds, arguments.prompts):
        add_results(arguments.results, new)
    results = read_results(arguments.results)
    write_figures(results, arguments.page.parent)
    write_table(results, arguments.page)


if __name__ == "__main__":
    main()
