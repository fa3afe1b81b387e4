"""Replies alone: our decode loop, and transformers' three ways, on one policy whose replies end at unequal lengths.

Useful tokens are those through the stop token. ``generate`` keeps no log-probabilities here, which PPO would need on
top (TRL keeps all logits for them); ours and continuous batching keep those of the tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ppo_harness
import ppo_work
import torch
from harness import peak_mb
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ARGS = ppo_harness.arguments()
WORK = ppo_harness.work_of(ARGS)
Draw = Callable[[int], list[int]]  # a seed → the lengths of the replies


def ours(model: Any, tokenizer: Any, prompts: list[list[int]]) -> Draw:
    """The rollout engine that PPO has."""
    from chatalign.rollout import Sampling, TransformersRollout

    engine = TransformersRollout(model, tokenizer.pad_token_id, batch_size=len(prompts))

    def draw(seed: int) -> list[int]:
        sampling = Sampling(
            max_new_tokens=ppo_work.RESPONSE,
            stop_token_ids=(tokenizer.eos_token_id,),
            temperature=ppo_work.TEMPERATURE,
            seed=seed,
        )
        return [len(ids) for ids in engine.generate(prompts, sampling).response_ids]

    return draw


def generation(tokenizer: Any, **more: Any) -> GenerationConfig:
    """The same draws as a generation config."""
    return GenerationConfig(
        max_new_tokens=ppo_work.RESPONSE,
        do_sample=True,
        temperature=ppo_work.TEMPERATURE,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], **more: Any) -> Draw:
    """``generate`` on left-padded prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    config = generation(tokenizer, **more)

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        replies = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
        ends = (replies == tokenizer.eos_token_id).long()
        return (ends.cumsum(1) - ends == 0).sum(1).tolist()

    return draw


def continuous(model: Any, tokenizer: Any, prompts: list[list[int]]) -> Draw:
    """``generate_batch``: paged attention, requests join as others end."""
    config = generation(tokenizer)

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        outputs = model.generate_batch(inputs=prompts, generation_config=config)
        if len(outputs) != len(prompts):
            raise SystemExit(f"generate_batch answered {len(outputs)} of {len(prompts)} prompts")
        return [len(output.generated_tokens) for output in outputs.values()]

    return draw


def main() -> None:
    """One warm round, then timed ones."""
    tokenizer = AutoTokenizer.from_pretrained(WORK.policy)
    prompts = [ppo_work.tokenized(tokenizer, row) for row in ppo_work.read(WORK.prompts)]
    model = AutoModelForCausalLM.from_pretrained(WORK.policy, dtype=torch.float32).eval()
    ways: dict[str, Callable[[], Draw]] = {
        "chatalign": lambda: ours(model, tokenizer, prompts),
        "generate": lambda: generate(model, tokenizer, prompts),
        "static": lambda: generate(model, tokenizer, prompts, cache_implementation="static"),
        "continuous": lambda: continuous(model, tokenizer, prompts),
    }
    half = torch.autocast("cpu", torch.bfloat16) if ARGS.dtype == "bfloat16" else nullcontext()
    before_mb = peak_mb()
    with half, torch.no_grad():
        draw = ways[ARGS.variant]()
        draw(0)
        started, wall = time.process_time(), time.perf_counter()
        lengths = [length for seed in range(1, ARGS.iterations + 1) for length in draw(seed)]
        cpu_s, wall_s = time.process_time() - started, time.perf_counter() - wall
    result = {
        "bench": "ppo-rollout",
        "work": "rollout",
        "arm": f"{ARGS.variant}-{ARGS.dtype}",
        "model": ARGS.size,
        "dtype": ARGS.dtype,
        "replies": len(lengths),
        "tokens": sum(lengths),
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "items_per_cpu_s": sum(lengths) / cpu_s,
        "peak_mb": peak_mb(),
        "drawing_mb": peak_mb() - before_mb,
        "versions": ppo_harness.versions("torch", "transformers"),
    }
    Path(ARGS.out).write_text(json.dumps(result) + "\n")


main()
