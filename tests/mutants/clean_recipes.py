"""Twelve recipes that nothing is wrong with, over six families of chat templates, and their files on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat_families import BY_NAME, make, tokenizer_of
from tiny import make_llama

from chatalign.recipe import STAGES, Recipe
from chatalign.recipe.load import merge

LORA = {"r": 4, "lora_alpha": 8}
FAMILIES = ("chatml_plain", "llama3", "mistral", "gemma", "zephyr", "no_template")
# What users' rows hold and no guard may take for a fault: one prompt with two replies, several turns, other
# scripts, a special token's text, white space at the ends, a reply of one letter and one that repeats its prompt.
QUESTIONS = {
    "What is the capital of France?": ("Paris. ", "The capital is London, I think."),
    "1 + 2 = ": ("3", "I don't know what 1 + 2 is."),
    "你好，世界": ("你好！很高兴见到你。", "Hello."),
    "Say hello world": ("hello world", "hello"),
    "Which token ends a turn?": ("It is <|im_end|> or </s>.", "It is\n\n\tthis one."),
    "  Thank you! ": ("You're welcome.", "Thank you!"),
    "Name a prime number.": ("7", "8"),
    "Name a prime number, please.": ("Seven is a prime number.\n\n- it is odd\n- it is small", "Nine is one."),
}
REWARD = '''
def brief(*, prompts, replies, extras):
    """The fewer characters the better."""
    return [-0.1 * len(reply) for reply in replies]
'''


@dataclass(frozen=True)
class Clean:
    """A recipe without its paths: `starts_from` and `rewards_by` are other recipes' names, or the family's model."""

    stage: str
    family: str
    rows: str
    over: dict[str, Any]
    starts_from: str | None = None
    rewards_by: str | None = None


TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXTS_NOT_TURNS = {"data": {"apply_chat_template": False}}
RECIPES = {
    "pretrain-from-nothing": Clean("pretrain", "no_template", "text", {"model": {"config": TINY}}),
    "sft-on-strings": Clean("sft", "no_template", "strings", TEXTS_NOT_TURNS, starts_from="pretrain-from-nothing"),
    "sft": Clean("sft", "chatml_plain", "turns", {"data": {"eval_fraction": 0.3}}),
    "dpo-from-sft": Clean("dpo", "chatml_plain", "pairs", {}, starts_from="sft"),
    "sft-lora": Clean("sft", "llama3", "turns", {"lora": LORA, "data": {"packing": False}}),
    "dpo-on-its-adapter": Clean("dpo", "llama3", "conversations", {}, starts_from="sft-lora"),
    "sft-last-reply": Clean("sft", "mistral", "sharegpt", {"data": {"supervise": "last_assistant"}}),
    "kto-lora": Clean("kto", "mistral", "thumbs", {"lora": LORA, "data": {"packing": False}}),
    "dpo-lora": Clean("dpo", "gemma", "pairs", {"lora": LORA, "dpo": {"loss_type": "ipo"}}),
    "ppo-by-function": Clean("ppo", "gemma", "prompts", {"ppo": {"value": "shared"}, "lora": LORA}),
    "reward": Clean("reward", "zephyr", "pairs", {"data": {"max_length": 64, "max_prompt_length": 32}}),
    "ppo-by-model": Clean("ppo", "zephyr", "turns", {}, rewards_by="reward"),
}
TRAIN = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "warmup_steps": 0,
    "save_strategy": "no",
    "use_cpu": True,
}
PPO = {
    "total_episodes": 8,
    "rollout_batch_size": 4,
    "num_ppo_epochs": 1,
    "response_length": 6,
}


def family_tokenizer(name: str) -> Any:
    """The tokenizer of a family, made in memory; `no_template` is a base model's."""
    return make("", "<|end|>") if name == "no_template" else tokenizer_of(BY_NAME[name])


def write_models(folder: Path) -> None:
    """A random-init Llama with its tokenizer for each family, as ``folder/FAMILY``."""
    for name in FAMILIES:
        tokenizer = family_tokenizer(name)
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = make_llama(len(tokenizer), **ids, bos_token_id=tokenizer.bos_token_id)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def row_files() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file by its name."""
    system = {"role": "system", "content": "You are brief."}
    asked = list(QUESTIONS.items())
    after = {question: asked[i - 1] for i, (question, _) in enumerate(asked)}
    turns = [{"messages": [system, *_turns(question, good)]} for question, (good, _) in asked[:4]]
    turns += [{"messages": _turns(after[q][0], after[q][1][0], q, good)} for q, (good, _) in asked]
    turns += [{"messages": _turns("Name a prime number.", "11")}]
    names = {"user": "human", "assistant": "gpt"}
    return {
        "text": [{"text": f"{question} {good} {bad}"} for question, (good, bad) in asked],
        "strings": [{"prompt": question, "completion": f" {good}"} for question, (good, _) in asked],
        "turns": turns,
        "sharegpt": [
            {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in _turns(q, bad, q, good)]}
            for q, (good, bad) in asked
        ],
        "pairs": [{"prompt": question, "chosen": good, "rejected": bad} for question, (good, bad) in asked],
        "conversations": [
            {"chosen": _turns(*after[q][:1], "Hm.", q, good), "rejected": _turns(*after[q][:1], "Hm.", q, bad)}
            for q, (good, bad) in asked
        ],
        "thumbs": [
            {"prompt": question, "completion": reply, "label": reply == good}
            for question, (good, bad) in asked
            for reply in (good, bad)
        ],
        "prompts": [{"prompt": question, "number": i} for i, question in enumerate(QUESTIONS)],
    }


def write_rows(folder: Path) -> None:
    """Every file of rows, as ``folder/NAME.jsonl``, and ``folder/rewards.py``."""
    for name, rows in row_files().items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    (folder / "rewards.py").write_text(REWARD, "utf-8")


def clean_recipe(name: str, folder: Path) -> Recipe:
    """The recipe `name`; `folder` holds the rows, ``models/`` and, in ``runs/``, what the recipes make."""
    clean = RECIPES[name]
    place = folder / "runs" / clean.starts_from if clean.starts_from else folder / "models" / clean.family
    raw: dict[str, Any] = {
        "stage": clean.stage,
        "output_dir": str(folder / "runs" / name),
        "model": {"name_or_path": str(place)},
        "data": {"datasets": [{"path": str(folder / f"{clean.rows}.jsonl")}], "max_length": 128},
        "train": TRAIN,
    }
    if "config" in clean.over.get("model", {}):
        raw["model"] = {"tokenizer_name_or_path": str(place)}
    if clean.stage == "ppo":
        raw["ppo"] = PPO
        if clean.rewards_by:
            raw["reward_model"] = {"name_or_path": str(folder / "runs" / clean.rewards_by)}
        else:
            raw["ppo"] = PPO | {"rewards": [{"function": f"{folder / 'rewards.py'}:brief"}]}
    return STAGES[clean.stage].model_validate(merge(raw, clean.over))  # type: ignore[return-value]
