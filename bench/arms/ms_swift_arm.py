"""ms-swift's arms, through its own ``sft_main`` and ``rlhf_main``: as it comes (default) and at its best here (tuned).

Runs in the environment that ``peers.py ms-swift`` makes. Its ``chatml`` template supervises a newline after the stop
token that chatalign's and the floor's targets don't have; the arm registers that template without the newline, so that
the tokens are the same and the losses can be compared.

Tuned leaves out the recomputation that is on by default and groups SFT rows by length. It packs only with
FlashAttention ('The "packing" feature requires a flash attention implementation'), so not on a CPU.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness

ARGS = harness.arguments()
STAGE = ARGS.work.split("-")[0]
TUNED = ARGS.variant == "tuned"
TEMPLATE = "chatml_without_newline"


def write_rows(folder: Path) -> None:
    """The rows in ms-swift's format: messages, and beside them the reply that was not chosen."""
    for name, file in (("train", ARGS.rows), ("probe", ARGS.probe)):
        with (folder / f"{name}.jsonl").open("w") as out:
            for row in harness.read_rows(file):
                swift_row = {"messages": row["prompt"] + row["completion" if STAGE == "sft" else "chosen"]}
                if STAGE != "sft":
                    swift_row["rejected_response"] = row["rejected"][0]["content"]
                out.write(json.dumps(swift_row) + "\n")


def register_template() -> None:
    """ChatML as the tokenizer's own template writes it, up to the stop token."""
    from swift.template import TemplateMeta, register_template

    meta = TemplateMeta(
        TEMPLATE,
        prefix=[],
        prompt=["<|im_start|>user\n{{QUERY}}<|im_end|>\n<|im_start|>assistant\n"],
        chat_sep=["<|im_end|>\n"],
        suffix=["<|im_end|>"],
        system_prefix=["<|im_start|>system\n{{SYSTEM}}<|im_end|>\n"],
    )
    register_template(meta)


def recipe(folder: Path) -> dict[str, Any]:
    """What its command line would say."""
    settings = {
        "model": ARGS.model,
        "model_type": "llama",
        "template": TEMPLATE,
        "torch_dtype": "float32",
        "bf16": ARGS.dtype == "bfloat16",
        "fp16": False,
        "use_cpu": True,
        "use_hf": True,
        "check_model": False,  # would compare the files with a hub's
        "tuner_type": "lora" if "lora" in ARGS.work else "full",
        "dataset": [str(folder / "train.jsonl")],
        "val_dataset": [str(folder / "probe.jsonl")],
        "max_length": 512,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": harness.BATCH,
        "per_device_eval_batch_size": harness.BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": harness.LEARNING_RATE,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": ["none"],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    if "lora" in ARGS.work:
        settings |= {"lora_rank": harness.LORA["r"], "lora_alpha": harness.LORA["lora_alpha"]}
        settings |= {"lora_dropout": harness.LORA["lora_dropout"], "target_modules": harness.LINEARS}
    if STAGE != "sft":
        settings["rlhf_type"] = {"dpo": "dpo", "reward": "rm"}[STAGE]
    if TUNED:
        settings |= {"gradient_checkpointing": False, "group_by_length": STAGE == "sft"}
    return settings


def counter() -> harness.Count:
    """Pairs, or tokens that aren't padding."""
    from transformers import AutoTokenizer

    pad = AutoTokenizer.from_pretrained(ARGS.model).pad_token_id
    if STAGE == "sft":
        return lambda inputs: int((inputs["input_ids"] != pad).sum())
    return lambda inputs: inputs["input_ids"].shape[0] // 2


def probe_loss(trainer: Any) -> float:
    """The mean over all supervised tokens, or pairs, of the probe rows, by the trainer's own collator and loss."""
    batches = list(trainer.get_eval_dataloader())
    weights = [
        int((batch["labels"][:, 1:] != -100).sum()) if STAGE == "sft" else batch["input_ids"].shape[0] // 2
        for batch in batches
    ]
    total = 0.0
    for batch, weight in zip(batches, weights, strict=True):
        # The model is wrapped in autocast only when training begins.
        with trainer.template.forward_context(trainer.model, batch), trainer.accelerator.autocast():
            inputs = trainer._prepare_inputs(batch)
            if STAGE == "sft":
                loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=sum(weights))
            else:
                loss = trainer.compute_loss(trainer.model, inputs) * (weight / sum(weights))
        loss.backward()
        total += float(loss.detach())
    return total


def main() -> None:
    """Run the stage and write what was measured."""
    from swift import RLHFArguments, SftArguments, rlhf_main, sft_main

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        register_template()
        measured = harness.install(counter(), probe_loss)
        if STAGE == "sft":
            sft_main(SftArguments(**recipe(folder)))
        else:
            rlhf_main(RLHFArguments(**recipe(folder)))
    assert math.isfinite(measured.losses[-1])
    harness.finish(measured, ARGS, f"ms-swift-{ARGS.variant}", ["ms-swift", "trl", "peft", "accelerate", "datasets"])


main()
