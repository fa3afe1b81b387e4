"""LLaMA-Factory's arms, through its own ``run_exp``: as it comes (default) and at its best here (tuned).

Runs in the environment that ``peers.py llamafactory`` makes. Its ``chatml`` template supervises a newline after the
stop token that chatalign's and the floor's targets don't have; the arm registers that template without the newline, so
that the tokens are the same and the losses can be compared. Reward models have another head here (with a bias, dropout
and an initialisation of its own), so only the body's work is the same, not the loss.

The run ends with the training, as TRL's arm does. What would follow is saving, which 0.9.5 cannot do for a reward
model whose embedding and head are tied ("some tensors share memory").

Tuned leaves out the recomputation that is on by default and packs SFT rows with a block-diagonal mask
(``neat_packing``). Pairs have nothing more to turn on: packing is for SFT, and grouping by length finds no column of
lengths in pairs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness

ARGS = harness.arguments()
STAGE = {"sft": "sft", "dpo": "dpo", "reward": "rm"}[ARGS.work.split("-")[0]]
TUNED = ARGS.variant == "tuned"
TEMPLATE = "chatml_without_newline"


def write_rows(folder: Path) -> None:
    """The rows in LLaMA-Factory's format, with the `dataset_info.json` that it looks them up in."""
    info = {}
    for name, file in (("train", ARGS.rows), ("probe", ARGS.probe)):
        rows = [{key: turns[0]["content"] for key, turns in row.items()} for row in harness.read_rows(file)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
        replies = {"response": "completion"} if STAGE == "sft" else {"chosen": "chosen", "rejected": "rejected"}
        columns = {"prompt": "prompt", **replies}
        info[name] = {"file_name": f"{name}.json", "ranking": STAGE != "sft", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def register_template() -> None:
    """ChatML as the tokenizer's own template writes it, up to the stop token."""
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import register_template

    register_template(
        name=TEMPLATE,
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        stop_words=["<|im_end|>"],
        replace_eos=True,
    )


def recipe(folder: Path) -> dict[str, Any]:
    """What its YAML would say."""
    packed = STAGE == "sft" and TUNED
    settings = {
        "stage": STAGE,
        "do_train": True,
        "finetuning_type": "lora" if "lora" in ARGS.work else "full",
        "model_name_or_path": ARGS.model,
        "template": TEMPLATE,
        "dataset_dir": str(folder),
        "dataset": "train",
        "eval_dataset": "probe",
        # Packing takes one off the cutoff, to pad each pack to a multiple of 8 again.
        "cutoff_len": 512,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": harness.PACKS if packed else harness.BATCH,
        "per_device_eval_batch_size": harness.BATCH,
        "learning_rate": harness.LEARNING_RATE,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": ARGS.dtype == "bfloat16",
    }
    if "lora" in ARGS.work:
        settings |= {"lora_rank": harness.LORA["r"], "lora_alpha": harness.LORA["lora_alpha"]}
        settings |= {"lora_dropout": harness.LORA["lora_dropout"], "lora_target": ",".join(harness.LINEARS)}
    if TUNED:
        settings |= {"disable_gradient_checkpointing": True}
    return settings | ({"packing": True, "neat_packing": True} if packed else {})


def counter() -> harness.Count:
    """Pairs, or tokens that aren't padding: packs are padded too, and their mask has four axes."""
    from transformers import AutoTokenizer

    pad = AutoTokenizer.from_pretrained(ARGS.model).pad_token_id
    if STAGE == "sft":
        return lambda inputs: int((inputs["input_ids"] != pad).sum())
    return lambda inputs: inputs["input_ids"].shape[0] // 2


def probe_loss(trainer: Any) -> float:
    """The mean over all supervised tokens, or pairs, of the probe rows, by the trainer's own collator and loss."""
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader()]
    if STAGE == "sft":
        weights = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    else:
        weights = [batch["input_ids"].shape[0] // 2 for batch in batches]
    total = 0.0
    for batch, weight in zip(batches, weights, strict=True):
        with trainer.accelerator.autocast():  # the model is wrapped in it only when training begins
            if STAGE == "sft":
                loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=sum(weights))
            else:
                loss = trainer.compute_loss(trainer.model, batch) * (weight / sum(weights))
        loss.backward()
        total += float(loss.detach())
    return total


class TrainingIsOver(Exception):
    """Leaves `run_exp` before it saves."""


def main() -> None:
    """Run the stage and write what was measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        from llamafactory.train.tuner import run_exp
        from transformers import TrainerCallback

        class End(TrainerCallback):
            def on_train_end(self, args, state, control, **kwargs):  # the callback interface
                raise TrainingIsOver

        write_rows(folder)
        register_template()
        measured = harness.install(counter(), probe_loss)
        with contextlib.suppress(TrainingIsOver):
            run_exp(recipe(folder), callbacks=[End()])
    assert math.isfinite(measured.losses[-1])
    versions = ["llamafactory", "trl", "peft", "accelerate", "datasets"]
    harness.finish(measured, ARGS, f"llamafactory-{ARGS.variant}", versions)


main()
