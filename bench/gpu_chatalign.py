"""chatalign's side of bench/gpu_arm.py: a stage's own trainer on a model and rows that are in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from gpu_work import Arm, Work

from chatalign.artifact import BaseModelRef
from chatalign.data.collate import collate_lm, collate_pairs
from chatalign.engine.dpo_trainer import DpoTrainer
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.reward_trainer import RewardTrainer
from chatalign.engine.stage import training_arguments
from chatalign.models.adapters import new_adapter, ready_to_train
from chatalign.models.heads import new_score_head
from chatalign.models.reference import Reference
from chatalign.recipe import apply_overrides, validate_stage
from chatalign.runs import Run


def recipe_of(work: Work, arm: Arm, folder: Path, device: str) -> Any:
    """The work as a recipe, with what the arm changes in it."""
    raw = {
        "stage": work.stage,
        "output_dir": str(folder),
        "model": {"name_or_path": "random"},
        "data": {"datasets": [{"path": "random"}], "max_length": work.max_length},
        "train": {
            "learning_rate": 1e-5,
            "per_device_train_batch_size": work.batch,
            "per_device_eval_batch_size": 2,
            "max_steps": work.warm + work.steps,
            "logging_steps": work.warm + work.steps,
            "save_strategy": "no",
            "use_cpu": device == "cpu",
            "gradient_checkpointing": work.checkpointing,
        },
    } | ({"lora": {"r": 16, "lora_alpha": 32}} if work.tuning != "full" else {})
    change = dict(arm.change)
    if change.get("data.packing") is False:  # rows instead of packs, about as many tokens
        change["train.per_device_train_batch_size"] = work.rows_a_step
    return validate_stage(apply_overrides(raw, change), where=arm.name)


def build(
    work: Work, arm: Arm, model: Any, tokenizer: Any, rows: Any, probe_rows: Any, *, folder: Path, device: str
) -> tuple[Any, Any, Any, str]:
    """The trainer, what it counts in a micro-batch, its probe, and what it says it runs with."""
    recipe = recipe_of(work, arm, folder, device)
    adapter = recipe.lora is not None
    if work.stage == "reward":
        head = new_score_head(model.config.hidden_size, seed=0).to(device)
        head.load_state_dict(model.score.state_dict())
        model.score = head
    if adapter:
        base = BaseModelRef(name_or_path="random")
        task = "SEQ_CLS" if work.stage == "reward" else "CAUSAL_LM"
        model = new_adapter(model, recipe.lora, base, task_type=task, seed=0)
    ready_to_train(model, gradient_checkpointing=bool(recipe.train.gradient_checkpointing) and adapter)
    run = Run(folder=folder, run_id="bench", fingerprint="bench", parents=[])
    settings: dict[str, Any] = {
        "recipe": recipe,
        "run": run,
        "args": training_arguments(recipe, run, is_adapter=adapter),
        "model": model,
        "tokenizer": tokenizer,
        "train_rows": rows,
        "eval_rows": probe_rows,
    }
    if work.stage == "sft":
        trainer: Any = LmTrainer(**settings, collate=collate_lm)
    elif work.stage == "reward":
        trainer = RewardTrainer(**settings, collate=collate_pairs)
    else:
        twin = None if adapter else copy.deepcopy(model).eval().requires_grad_(False)
        reference = Reference(model, way="disabled") if adapter else Reference(model, way="copy", module=twin)
        trainer = DpoTrainer(**settings, reference=reference)
    return trainer, count, probe_loss, trainer.ran_with


def count(inputs: dict[str, Any]) -> int:
    """Tokens, or pairs."""
    return int(inputs["num_sequences"]) // 2 if "pool_positions" in inputs else int(inputs["input_ids"].numel())


def probe_loss(trainer: Any) -> float:
    """The mean over the probe's targets, or pairs, with its gradient."""
    batches = list(trainer.get_eval_dataloader())
    items = sum(trainer.count_items(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        batch.pop("filler")
        with trainer.accelerator.autocast():
            loss, _ = trainer.objective(trainer.model, trainer._prepare_inputs(batch), items)
        loss.backward()
        total += float(loss.detach())
    return total
