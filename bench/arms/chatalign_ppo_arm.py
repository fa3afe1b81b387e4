"""chatalign's PPO arms: the stage as ``chatalign ppo RECIPE`` runs it, on the peers' settings."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import ppo_harness
import ppo_work
import yaml

ARGS = ppo_harness.arguments()
WORK = ppo_harness.work_of(ARGS)
IS_LORA = ARGS.work.startswith("lora")
MICRO_BATCH = 16 if ARGS.variant == "micro" else ppo_work.PROMPTS


def recipe(folder: Path) -> dict[str, Any]:
    """The models, prompts and hyperparameters of all arms; everything else is the default."""
    return {
        "stage": "ppo",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(WORK.policy), "dtype": "float32"},
        "reward_model": {"name_or_path": str(WORK.reward_adapter if IS_LORA else WORK.reward), "dtype": "float32"},
        "data": {"datasets": [{"path": str(WORK.prompts)}], "max_prompt_length": 512},
        "ppo": {
            "total_episodes": ppo_work.PROMPTS * (ppo_harness.WARM + ARGS.iterations),
            "rollout_batch_size": ppo_work.PROMPTS,
            "num_ppo_epochs": ppo_work.EPOCHS,
            "num_mini_batches": 1,
            "response_length": ppo_work.RESPONSE,
            "min_response_length": ppo_work.RESPONSE if ppo_harness.lengths_of(ARGS.work) == "equal" else 0,
            "temperature": ppo_work.TEMPERATURE,
            "missing_eos_penalty": None,
            "normalize_reward": False,
            "value": "shared" if ARGS.variant == "shared" else "separate",
        },
        "train": {
            "learning_rate": ppo_work.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "per_device_train_batch_size": MICRO_BATCH,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": ARGS.dtype == "bfloat16",
        },
    } | ({"lora": harness.LORA | {"target_modules": harness.LINEARS}} if IS_LORA else {})


def probe(trainer: Any) -> dict[str, list[float]]:
    """Scores, log-probabilities under policy and reference, and values of the probe's replies."""
    from chatalign.engine.ppo_rewards import Replies

    rows = ppo_work.read(WORK.probe)
    prompts, responses = ([row[name] for row in rows] for name in ("prompt_ids", "response_ids"))
    collector = trainer.play.collector
    unread: list[Any] = [None] * len(rows)  # what a reward model of the policy's own tokens never looks at
    replies = Replies(prompt_ids=prompts, response_ids=responses, prompts=unread, texts=unread, extras=unread)
    with trainer.accelerator.autocast():
        scores, _ = collector.rewards(replies)
        ref_logps, logps, values, _ = collector._measure(prompts, responses, logps=True)
    return {
        "scores": scores.tolist(),
        "logps": logps.tolist(),
        "ref_logps": ref_logps.tolist(),
        "values": values.tolist(),
    }


def main() -> None:
    """Run the stage and write what was measured."""
    import chatalign
    from chatalign.warm import import_once

    import_once("chatalign.ppo")  # as the command does, before anything imports torch
    from chatalign.engine.ppo_trainer import PpoTrainer
    from chatalign.rollout import TransformersRollout

    clock = ppo_harness.Clock()
    first: dict[str, float] = {}
    found: dict[str, Any] = {}
    train, new_experience, finish_rollout = PpoTrainer.train, PpoTrainer._new_experience, PpoTrainer._finish_rollout
    generate = TransformersRollout.generate

    def watched_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.update(probe(self))
        clock.watch_optimizer()
        return train(self, *args, **kwargs)

    def watched_experience(self: Any, rollout: int) -> Any:
        experience = new_experience(self, rollout)
        if rollout == 0:
            first.update({name: x for name, x in experience.metrics.items() if math.isfinite(x)})
        clock.enter("update")
        return experience

    def watched_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.enter("rollout")
        rollout = generate(self, *args, **kwargs)
        clock.enter("scoring")
        clock.drew([len(ids) for ids in rollout.response_ids])
        return rollout

    def watched_finish(self: Any, *args: Any) -> None:
        finish_rollout(self, *args)
        clock.end_iteration()

    PpoTrainer.train, PpoTrainer._new_experience = watched_train, watched_experience
    PpoTrainer._finish_rollout, TransformersRollout.generate = watched_finish, watched_generate
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe(Path(name))))
        chatalign.run_stage(chatalign.load_recipe(file))
    at_start = {"score": first["objective/score"], "kl": first["objective/kl"]}
    ppo_harness.finish(clock, ARGS, f"chatalign-{ARGS.variant}-{ARGS.dtype}", at_start, found)


main()
