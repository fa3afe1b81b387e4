"""chatalign's arms: the stage as ``chatalign STAGE RECIPE`` runs it, with its own defaults; tuned, compiled layers."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import yaml

ARGS = harness.arguments()
STAGE = ARGS.work.split("-")[0]


def recipe(folder: Path) -> dict[str, Any]:
    """The rows, the precision and the step's size that the other arms have; everything else is the default."""
    lora = harness.LORA | {"target_modules": harness.LINEARS}
    return {
        "stage": STAGE,
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": ARGS.model, "dtype": "float32"},
        "data": {
            "datasets": [{"path": ARGS.rows}],
            "eval_datasets": [{"path": ARGS.probe}],
            "max_length": 512,
        },
        "train": {
            "learning_rate": harness.LEARNING_RATE,
            "per_device_train_batch_size": harness.PACKS if STAGE == "sft" else harness.BATCH,
            "num_train_epochs": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": ARGS.dtype == "bfloat16",
            "torch_compile": ARGS.variant == "tuned",
        },
    } | ({"lora": lora} if "lora" in ARGS.work else {})


def count(inputs: dict[str, Any]) -> int:
    """Tokens, or pairs."""
    return int(inputs["num_tokens"]) if STAGE == "sft" else int(inputs["num_sequences"]) // 2


def probe_loss(trainer: Any) -> float:
    """The mean over all supervised tokens, or pairs, of the probe rows."""
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


def main() -> None:
    """Run the stage and write what was measured."""
    import chatalign
    from chatalign.warm import import_once

    import_once(f"chatalign.{STAGE}", adapter="lora" in ARGS.work)  # as the command does, before anything imports torch
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe(Path(name))))
        measured = harness.install(count, probe_loss)
        chatalign.run_stage(chatalign.load_recipe(file))
    harness.finish(measured, ARGS, f"chatalign-{ARGS.variant}", ["chatalign", "peft", "accelerate", "datasets"])


main()
