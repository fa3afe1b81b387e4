"""What PPO's arms work on: policies whose replies have equal or unequal lengths, their reward models, prompts, a probe.

``make(size, lengths)`` writes it once. A random-init model says everything alike, so its replies would never end; how
often they do is put into its weights, the same for all arms. Every embedding gets one common direction u, which the
hidden states then have, too; the output row of a token plus a · u raises that token's logit alike everywhere. With
``equal`` lengths no special token is ever drawn, with ``unequal`` the end of turn is, with probability END_PROBABILITY.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import workload

Lengths = Literal["equal", "unequal"]
PROMPTS, RESPONSE, TEMPERATURE = 64, 64, 0.7
EQUAL_PROMPT_TOKENS = 72
END_PROBABILITY = 0.04  # a token: replies of 24 tokens in the mean, some of all 64
PROBE_ROWS = 8
EPOCHS, LEARNING_RATE = 4, 3e-6
_BLOCKED = -1.0  # · u on top of what every token has: a probability of about exp(-20)


@dataclass(frozen=True)
class PpoWork:
    """Files of one size and kind of lengths."""

    policy: Path  # a language model and its tokenizer
    reward: Path  # a whole reward model, its head random
    reward_adapter: Path  # the same as an adapter on `policy`: a chatalign run
    prompts: Path  # rows with a conversation, as JSON lines
    probe: Path  # {"prompt_ids", "response_ids"}, as JSON lines


def files(size: str, lengths: Lengths) -> PpoWork:
    """Where they lie."""
    folder = workload.CACHE / f"ppo-{size}-{lengths}"
    return PpoWork(
        policy=folder / "policy",
        reward=folder / "reward",
        reward_adapter=folder / "reward-adapter",
        prompts=folder / "prompts.jsonl",
        probe=folder / "probe.jsonl",
    )


def make(size: str, lengths: Lengths) -> PpoWork:
    """Write what isn't there yet."""
    workload.make()
    work = files(size, lengths)
    if work.probe.is_file():
        return work
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.model_folder(size))
    rows = _equal_prompts(tokenizer) if lengths == "equal" else _prompts("dpo-short")
    work.policy.parent.mkdir(parents=True, exist_ok=True)
    _write(work.prompts, rows)
    prompt_ids = [tokenized(tokenizer, row) for row in rows]
    _save_policy(size, lengths, tokenizer, prompt_ids, work.policy)
    _save_rewards(work)
    _write(work.probe, _probe_rows(prompt_ids, tokenizer, lengths))
    return work


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def tokenized(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """A prompt as all arms have it: the template with its generation prompt."""
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(ids)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _prompts(work: str) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in read(workload.rows_file(work))[:PROMPTS]]


def _equal_prompts(tokenizer: Any) -> list[dict[str, Any]]:
    """The same, cut to one length. A cut text may be read as other tokens, so several cuts are tried."""
    rows: list[dict[str, Any]] = []
    texts = [row["prompt"][0]["content"] for row in read(workload.rows_file("dpo-long"))]
    for i in range(20 * PROMPTS):
        ids = tokenizer(" ".join(texts[(i + k) % len(texts)] for k in range(2)))["input_ids"][i // len(texts) :]
        for length in range(EQUAL_PROMPT_TOKENS - 16, EQUAL_PROMPT_TOKENS):
            row = {"prompt": [{"role": "user", "content": tokenizer.decode(ids[:length])}]}
            if len(tokenized(tokenizer, row)) == EQUAL_PROMPT_TOKENS:
                rows.append(row)
                break
        if len(rows) == PROMPTS:
            return rows
    raise SystemExit(f"only {len(rows)} prompts of {EQUAL_PROMPT_TOKENS} tokens; take another number")


def _save_policy(size: str, lengths: Lengths, tokenizer: Any, prompt_ids: list[list[int]], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workload.model_folder(size), dtype=torch.float32).eval()
    embedding, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    tied = embedding.data_ptr() == head.data_ptr()
    direction = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    specials = sorted(tokenizer.all_special_ids)
    plain_rows = head[specials].clone()
    embedding += direction
    if tied:
        plain_rows += direction
    head[specials] = plain_rows + _BLOCKED * direction
    if lengths == "unequal":
        end, row = tokenizer.eos_token_id, plain_rows[specials.index(tokenizer.eos_token_id)]
        low, high = _BLOCKED, 3.0
        for _ in range(20):
            middle = (low + high) / 2
            head[end] = row + middle * direction
            low, high = (middle, high) if _probability(model, prompt_ids, end) < END_PROBABILITY else (low, middle)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _probability(model: Any, prompt_ids: list[list[int]], token: int) -> float:
    """Mean probability of a token after random replies, at the temperature of the rollouts."""
    import torch

    draw = torch.Generator().manual_seed(2)
    rows = torch.tensor([ids[-16:] for ids in prompt_ids[:16]])
    replies = torch.randint(300, model.config.vocab_size, (len(rows), 32), generator=draw)
    with torch.no_grad():
        logits = model(input_ids=torch.cat((rows, replies), 1)).logits[:, rows.shape[1] :]
    return float((logits / TEMPERATURE).softmax(-1)[..., token].mean())


def _save_rewards(work: PpoWork) -> None:
    """A few steps of chatalign's reward stage with LoRA, and the same folded into its base for who needs it whole."""
    import yaml

    import chatalign

    with tempfile.TemporaryDirectory() as name:
        recipe = {
            "stage": "reward",
            "output_dir": str(work.reward_adapter),
            "model": {"name_or_path": str(work.policy), "dtype": "float32"},
            "data": {"datasets": [{"path": str(workload.rows_file("dpo-short"))}], "max_length": 512},
            "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
            "train": {"learning_rate": 1e-3, "max_steps": 8, "save_strategy": "no", "use_cpu": True, "bf16": False},
        }
        file = Path(name) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        chatalign.run_stage(chatalign.load_recipe(file))
    from chatalign.merge import merge

    merge(work.reward_adapter, work.reward)


def _probe_rows(prompt_ids: list[list[int]], tokenizer: Any, lengths: Lengths) -> list[dict[str, Any]]:
    """Prompts with random replies, which every arm scores and measures before it trains."""
    draw = random.Random(3)
    rows = []
    for ids in prompt_ids[:PROBE_ROWS]:
        length = RESPONSE if lengths == "equal" else draw.randint(4, RESPONSE)
        reply = [draw.randrange(300, tokenizer.vocab_size) for _ in range(length)]
        if lengths == "unequal" and length < RESPONSE:
            reply[-1] = tokenizer.eos_token_id
        rows.append({"prompt_ids": ids, "response_ids": reply})
    return rows
