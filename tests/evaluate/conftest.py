"""Tiny models that differ, a tiny reward model, held-out rows and a gold function, all on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

GOLD = '''
def score(*, messages, reply, row, ended):
    """One point for each letter of the reply up to ten, a tenth for ending."""
    length = min(len(reply), 10)
    correct = float(reply in row["answers"])
    return {"gold": length + 0.1 * ended, "correct": correct, "format": float(ended), "kind": row["kind"]}


def number(*, messages, reply, row, ended):
    return float(len(messages))


def broken(*, messages, reply, row, ended):
    return {"score": 1.0}
'''


def llama_in(folder: Path, *, seed: int) -> Any:
    """The session's tiny Llama with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, tiny_model_folder: Path) -> Path:
    """A folder with ``a``, ``b`` (models), ``rm`` (a reward model), ``adapter`` (on a), rows and ``gold.py``."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("world")
    for seed, name in ((1, "a"), (2, "b")):
        llama_in(tiny_model_folder, seed=seed).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    config = llama_in(tiny_model_folder, seed=0).config
    config.num_labels = 1
    torch.manual_seed(5)
    LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    tiny_tokenizer.save_pretrained(folder / "rm")
    adapted = get_peft_model(llama_in(tiny_model_folder, seed=1), LoraConfig(r=2, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "a")
    adapted.save_pretrained(folder / "adapter")
    tiny_tokenizer.save_pretrained(folder / "adapter")
    prompts = [
        {"prompt": [{"role": "user", "content": f"What is {i} + 1?"}], "kind": "add", "answers": [str(i + 1)]}
        for i in range(7)
    ]
    prompts.append({"prompt": [{"role": "system", "content": "短"}, {"role": "user", "content": "你好"}]})
    prompts[-1] |= {"kind": "talk", "answers": ["你好"]}
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    pairs = [
        {
            "prompt": f"What is {i}?",
            "chosen": str(i),
            "rejected": "no idea",
            "contrast": ("style", "correctness")[i % 2],
        }
        for i in range(6)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "texts.txt").write_text("hello world, what is the capital of France?\n你好，世界\n" + "1 + 2 = 3 " * 200)
    (folder / "gold.py").write_text(GOLD)
    return folder
