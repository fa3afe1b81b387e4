"""TRL's side of bench/gpu_arm.py: its trainers on the same model, token ids and targets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from gpu_work import Arm, Work

IGNORED = -100


def build(
    work: Work, arm: Arm, model: Any, tokenizer: Any, rows: Any, probe_rows: Any, *, folder: Path, device: str
) -> tuple[Any, Any, Any, str]:
    """The trainer, what it counts in a micro-batch, its probe, and what it runs with."""
    import torch
    from peft import LoraConfig, get_peft_model

    change = dict(arm.change)
    attention = change.pop("attn", "sdpa")
    packing = bool(change.pop("packing", False)) and work.stage == "sft"
    model.set_attn_implementation(attention)
    if work.tuning != "full":
        task = "SEQ_CLS" if work.stage == "reward" else "CAUSAL_LM"
        torch.manual_seed(0)  # as chatalign's adapter is drawn
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task))
        model.enable_input_require_grads()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": 1e-5,
        "per_device_train_batch_size": work.batch if packing else work.rows_a_step,
        "per_device_eval_batch_size": 2,
        "max_steps": work.warm + work.steps,
        "logging_steps": work.warm + work.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": work.max_length,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        **change | ({"gradient_checkpointing": True} if work.checkpointing else {}),
    }
    common = {"model": model, "processing_class": tokenizer}
    trainer = _sft if work.stage == "sft" else _pairs
    built = trainer(work, settings, common, rows, probe_rows, packing)
    note = f"attention: {attention}, {'packed' if packing else 'padded'}"
    return built, (count_tokens if work.stage == "sft" else count_pairs), _PROBES[work.stage], note


def _sft(work: Work, settings: dict[str, Any], common: dict[str, Any], rows: Any, probe: Any, packing: bool) -> Any:
    from trl import SFTConfig, SFTTrainer

    def labelled(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["supervised"], strict=True)
        return {"labels": [token if target else IGNORED for token, target in pairs]}

    return SFTTrainer(
        args=SFTConfig(**settings, packing=packing, eval_packing=False),
        train_dataset=rows.map(labelled, remove_columns=["supervised"], keep_in_memory=True),
        eval_dataset=probe.map(labelled, remove_columns=["supervised"], keep_in_memory=True),
        **common,
    )


def _pairs(work: Work, settings: dict[str, Any], common: dict[str, Any], rows: Any, probe: Any, packing: bool) -> Any:
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    if work.stage == "reward":

        def joined(row: dict[str, Any]) -> dict[str, Any]:
            return {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}

        rows, probe = (each.map(joined, remove_columns=["prompt_ids"], keep_in_memory=True) for each in (rows, probe))
        return RewardTrainer(args=RewardConfig(**settings), train_dataset=rows, eval_dataset=probe, **common)

    class TokenizedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenized, with TRL's own column names

    twin = copy.deepcopy(common["model"]) if work.tuning == "full" else None
    return TokenizedDPOTrainer(
        args=DPOConfig(**settings), train_dataset=rows, eval_dataset=probe, ref_model=twin, **common
    )


def count_tokens(inputs: dict[str, Any]) -> int:
    """Tokens that are no padding."""
    return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else int(inputs["input_ids"].numel())


def count_pairs(inputs: dict[str, Any]) -> int:
    """Pairs: chosen and rejected are rows of their own."""
    return int(inputs["input_ids"].shape[0]) // 2


def _probe_tokens(trainer: Any) -> float:
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader()]
    targets = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=targets)
        loss.backward()
        total += float(loss.detach())
    return total


def _probe_pairs(trainer: Any) -> float:
    batches, total = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader()], 0.0
    pairs = sum(count_pairs(batch) for batch in batches)
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch) * (count_pairs(batch) / pairs)
        loss.backward()
        total += float(loss.detach())
    return total


_PROBES = {"sft": _probe_tokens, "dpo": _probe_pairs, "reward": _probe_pairs}
