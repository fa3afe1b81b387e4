"""TRL's arms: SFTTrainer, DPOTrainer and RewardTrainer, as they come (default) and at their best here (tuned)."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
from datasets import Dataset
from transformers import AutoTokenizer

ARGS = harness.arguments()
TUNED = ARGS.variant == "tuned"


def settings() -> dict[str, Any]:
    """TrainingArguments of all arms; tuned leaves out the recomputation that TRL turns on by default."""
    common = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": ARGS.dtype == "bfloat16",
        "num_train_epochs": 1,
        "learning_rate": harness.LEARNING_RATE,
        "per_device_train_batch_size": harness.BATCH,
        "per_device_eval_batch_size": harness.BATCH,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 512,
        "model_init_kwargs": {"dtype": "float32"},
    }
    return common | ({"gradient_checkpointing": False} if TUNED else {})


def peft_config() -> Any:
    """LoRA on every linear layer of the blocks, as chatalign's default is."""
    from peft import LoraConfig

    task = "SEQ_CLS" if ARGS.work.startswith("reward") else "CAUSAL_LM"
    return LoraConfig(target_modules=harness.LINEARS, task_type=task, **harness.LORA)


def sft(rows: Dataset, probe: Dataset, tokenizer: Any) -> tuple[Any, Any, Any]:
    """The trainer, what it counts, and its probe: the mean over all supervised tokens of the probe rows."""
    from trl import SFTConfig, SFTTrainer

    packed = {"packing": True, "per_device_train_batch_size": harness.PACKS} if TUNED else {}
    trainer = SFTTrainer(
        model=ARGS.model,
        args=SFTConfig(**settings() | packed),
        train_dataset=rows,
        eval_dataset=probe,
        processing_class=tokenizer,
        peft_config=peft_config() if "lora" in ARGS.work else None,
    )

    def count(inputs: dict[str, Any]) -> int:
        return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()

    def probe_loss(trainer: Any) -> float:
        batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader()]
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        with trainer.accelerator.autocast():  # the model is wrapped in it only when training begins
            losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=targets) for batch in batches]
        sum(losses).backward()
        return float(sum(losses).detach())

    return trainer, count, probe_loss


def pairs(rows: Dataset, probe: Dataset, tokenizer: Any) -> tuple[Any, Any, Any]:
    """The same for DPO and reward models: the mean over the probe's pairs."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    Trainer, Config = (DPOTrainer, DPOConfig) if ARGS.work.startswith("dpo") else (RewardTrainer, RewardConfig)
    trainer = Trainer(
        model=ARGS.model,
        args=Config(**settings()),
        train_dataset=rows,
        eval_dataset=probe,
        processing_class=tokenizer,
    )

    def count(inputs: dict[str, Any]) -> int:
        return inputs["input_ids"].shape[0] // 2

    def probe_loss(trainer: Any) -> float:
        total = 0.0
        for batch in trainer.get_eval_dataloader():
            share = count(batch) / len(probe)
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)) * share
            loss.backward()
            total += float(loss.detach())
        return total

    return trainer, count, probe_loss


def main() -> None:
    """Build, measure, write."""
    import torch

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ARGS.model)
    rows, probe = (Dataset.from_list(harness.read_rows(file)) for file in (ARGS.rows, ARGS.probe))
    # The counters of a trainer exist after it is built; the watch must be there before `train`.
    trainer, count, probe_loss = (sft if ARGS.work.startswith("sft") else pairs)(rows, probe, tokenizer)
    measured = harness.install(count, probe_loss)
    trainer.train()
    assert math.isfinite(measured.losses[-1])
    harness.finish(measured, ARGS, f"trl-{ARGS.variant}", ["trl", "peft", "accelerate", "datasets"])


main()
