"""chatalign's LoRA SFT on a batch of as many rows and tokens as PPO's: how much memory that takes."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import ppo_harness
import ppo_work
import yaml

ARGS = ppo_harness.arguments()
WORK = ppo_work.files(ARGS.size, "equal")


def rows() -> list[dict[str, object]]:
    """PPO's prompts with replies of as many tokens as its own have, the end of turn included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WORK.policy)
    prompts = ppo_work.read(WORK.prompts)
    # A letter and a digit by turns are a token each, whatever the vocabulary has learnt.
    found = []
    for row in prompts:
        for letters in range(ppo_work.RESPONSE):
            reply = [{"role": "assistant", "content": " ".join("xqzj"[i % 4] for i in range(letters))}]
            ids = tokenizer.apply_chat_template([*row["prompt"], *reply], return_dict=True)["input_ids"]
            if len(ids) >= ppo_work.EQUAL_PROMPT_TOKENS + ppo_work.RESPONSE:
                break
        found.append({"prompt": row["prompt"], "completion": reply})
    return found


def main() -> None:
    """Train an epoch a PPO epoch, and write the peak."""
    import chatalign
    from chatalign.warm import import_once

    import_once("chatalign.sft")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        recipe = {
            "stage": "sft",
            "output_dir": str(folder / "run"),
            "model": {"name_or_path": str(WORK.policy), "dtype": "float32"},
            "data": {"datasets": [{"path": str(data)}], "max_length": 512, "packing": False},
            "lora": harness.LORA | {"target_modules": harness.LINEARS},
            "train": {
                "learning_rate": harness.LEARNING_RATE,
                "per_device_train_batch_size": ppo_work.PROMPTS,
                "num_train_epochs": ppo_work.EPOCHS,
                "save_strategy": "no",
                "use_cpu": True,
                "bf16": ARGS.dtype == "bfloat16",
            },
        }
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        tokens: list[int] = []
        measured = harness.install(lambda inputs: tokens.append(inputs["input_ids"].numel()) or 0, lambda trainer: 0.0)
        chatalign.run_stage(chatalign.load_recipe(file))
    result = {
        "bench": "ppo-memory",
        "arm": f"chatalign-sft-lora-{ARGS.dtype}",
        "model": ARGS.size,
        "dtype": ARGS.dtype,
        "tokens": tokens,
        "peak_mb": harness.peak_mb(),
        "before_mb": measured.memory_before_mb,
        "versions": ppo_harness.versions("torch", "transformers", "peft"),
    }
    Path(ARGS.out).write_text(json.dumps(result) + "\n")


main()
