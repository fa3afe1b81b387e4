"""Axolotl's arms, through its own ``load_cfg``, ``load_datasets`` and ``train``: as it comes (default) and tuned.

Runs in the environment that ``peers.py axolotl`` makes. Rows are rendered by the tokenizer's own template, so the
tokens are those of the other arms. Nothing is recomputed by default. Tuned groups SFT rows by length; sample packing
is left out, because with SDPA it lets packed rows see each other ("does not handle cross-sample decontamination"), and
Axolotl refuses it for pairs. Under bfloat16 the weights themselves are bfloat16 here, in the other arms float32.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness

# Every run is reported to its makers otherwise.
os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}


def write_rows(stage: str, rows: list[dict[str, Any]], file: Path) -> None:
    """The rows in the format that Axolotl takes for the stage."""
    with file.open("w") as out:
        for row in rows:
            prompt = row["prompt"]
            if stage == "sft":
                written = {"messages": prompt + row["completion"]}
            elif stage == "dpo":
                written = {"messages": prompt, "chosen": row["chosen"][0], "rejected": row["rejected"][0]}
            else:
                written = {"system": "", "input": prompt[0]["content"]}
                written |= {reply: row[reply][0]["content"] for reply in ("chosen", "rejected")}
            out.write(json.dumps(written) + "\n")


def recipe(args: Any, folder: Path) -> dict[str, Any]:
    """What its YAML would say."""
    stage, tuned = args.work.split("-")[0], args.variant == "tuned"
    kind = {"sft": "chat_template", "dpo": "chat_template.default", "reward": "bradley_terry.chat_template"}[stage]
    files = {
        name: {"path": str(folder / f"{name}.jsonl"), "ds_type": "json", "split": "train", "type": kind}
        for name in ("train", "probe")
    }
    settings = {
        "base_model": args.model,
        "chat_template": "tokenizer_default",
        "datasets": [files["train"]],
        "test_datasets": [files["probe"]],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "sequence_len": 512,
        "micro_batch_size": harness.BATCH,
        "eval_batch_size": harness.BATCH,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": harness.LEARNING_RATE,
        "lr_scheduler": "linear",
        "optimizer": "adamw_torch_fused",
        "attn_implementation": "sdpa",
        "bf16": args.dtype == "bfloat16",
        "fp16": False,
        "tf32": False,
        "output_dir": str(folder / "run"),
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 100,
        "group_by_length": tuned and stage == "sft",
    }
    if "lora" in args.work:
        settings |= {"adapter": "lora", "lora_r": harness.LORA["r"], "lora_alpha": harness.LORA["lora_alpha"]}
        settings |= {"lora_dropout": harness.LORA["lora_dropout"], "lora_target_modules": harness.LINEARS}
        # Triton's kernels are chosen unless refused, on a CPU too.
        settings |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    if stage == "dpo":
        settings |= {"rl": "dpo", "rl_beta": 0.1}
    if stage == "reward":
        settings |= {"reward_model": True, "num_labels": 1, "model_type": "AutoModelForSequenceClassification"}
    return settings


def counter(args: Any) -> harness.Count:
    """Pairs, or tokens that aren't padding."""
    from transformers import AutoTokenizer

    pad = AutoTokenizer.from_pretrained(args.model).pad_token_id
    if args.work.startswith("sft"):
        return lambda inputs: int((inputs["input_ids"] != pad).sum())
    return lambda inputs: inputs["input_ids"].shape[0] // 2


def probe_loss(trainer: Any) -> float:
    """The mean over all supervised tokens, or pairs, of the probe rows, by the trainer's own collator and loss."""
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader()]
    # Its loss is the mean of a batch, whatever number of items it is told.
    weights = [
        int((batch["labels"][:, 1:] != -100).sum()) if "labels" in batch else batch["input_ids"].shape[0]
        for batch in batches
    ]
    total = 0.0
    for batch, weight in zip(batches, weights, strict=True):
        with trainer.accelerator.autocast():  # the model is wrapped in it only when training begins
            loss = trainer.compute_loss(trainer.model, batch) * (weight / sum(weights))
        loss.backward()
        total += float(loss.detach())
    return total


def main() -> None:
    """Run the stage and write what was measured."""
    import yaml
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import train

    args = harness.arguments()
    stage = args.work.split("-")[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(stage, harness.read_rows(args.rows), folder / "train.jsonl")
        write_rows(stage, harness.read_rows(args.probe), folder / "probe.jsonl")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(args, folder)))
        cfg = load_cfg(str(folder / "recipe.yaml"))
        load = load_preference_datasets if stage == "dpo" else load_datasets
        datasets = load(cfg=cfg, cli_args=TrainerCliArgs())
        measured = harness.install(counter(args), probe_loss)
        train(cfg=cfg, dataset_meta=datasets)
    assert math.isfinite(measured.losses[-1])
    harness.finish(measured, args, f"axolotl-{args.variant}", ["axolotl", "trl", "peft", "accelerate", "datasets"])


if __name__ == "__main__":  # Axolotl's workers import this file again
    main()
