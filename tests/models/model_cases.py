"""What the model tests share: recipes, a few steps of training, a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chatalign.models.adapters import Policy, load_policy, save_model
from chatalign.models.load import load_tokenizer
from chatalign.recipe import validate_stage

QLORA = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
LORA = {"r": 4, "lora_alpha": 8}
IDS = torch.arange(4, 40)[None]


def make_recipe(stage: str, start: str | Path | None = None, **sections: Any) -> Any:
    """A valid recipe of a stage whose data is never read."""
    sections.setdefault("model", {"name_or_path": str(start)})
    raw = {"stage": stage, "output_dir": "unused", "data": {"datasets": [{"path": "unused.jsonl"}]}, **sections}
    return validate_stage(raw, where="test")


def train_a_little(model: Any, steps: int = 3) -> None:
    """A few AdamW steps on one row, enough to move every trainable weight."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any) -> torch.Tensor:
    """Float logits of the fixed row, in eval mode."""
    model.eval()
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.float()


def train_adapter(base: Path, folder: Path, **sections: Any) -> Path:
    """Train a LoRA adapter on `base` for three steps and save it to `folder`."""
    recipe = make_recipe("sft", base, **({"lora": LORA} | sections))
    tokenizer = load_tokenizer(recipe.model)
    policy: Policy = load_policy(recipe, tokenizer)
    train_a_little(policy.model)
    save_model(policy.model, tokenizer, folder, base_ref=policy.base_ref)
    return folder


def another_llama(folder: Path, *, seed: int, **config: Any) -> Any:
    """A Llama of `folder`'s shape with other weights, and other settings where given."""
    settings = AutoConfig.from_pretrained(folder)
    settings.update(config)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
