"""A toy whose optimum is known: over a finite set of replies, π* ∝ π_ref · exp(r / β)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from chatalign.engine import ppo_collect
from chatalign.engine.ppo_model import allow_all_tokens, forbid_tokens

from .conftest import Make, built

LETTERS, LENGTH, BETA = "abc", 2, 0.5
REWARD = """
import random

def table(*, prompts, replies, extras):
    return [random.Random(reply).uniform(0, 1.2) for reply in replies]
"""


def distribution(model: Any, prompt: list[int], replies: list[tuple[int, ...]]) -> torch.Tensor:
    """Probability of each reply, token by token."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *reply] for reply in replies])
        logps = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(2, torch.tensor(replies)[:, :, None]).squeeze(2).sum(1).exp()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_ppo_reaches_the_closed_form_optimum(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    (tmp_path / "table.py").write_text(REWARD, "utf-8")
    (tmp_path / "prompt.jsonl").write_text('{"prompt": "hello"}\n', "utf-8")
    over = {
        # The prompt alone, without a template: one token in place of twenty, half the time.
        "data": {"datasets": [{"path": str(tmp_path / "prompt.jsonl")}], "apply_chat_template": False},
        "ppo": {
            "total_episodes": 256 * 25,
            "rollout_batch_size": 256,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "response_length": LENGTH,
            "kl_coef": BETA,
            "lam": 1.0,
            "vf_coef": 0.5,
            "missing_eos_penalty": None,
            "whiten_advantages": False,
            "local_rollout_forward_batch_size": 256,
            "rewards": [{"function": f"{tmp_path / 'table.py'}:table"}],
        },
        "train": {
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": 128,
            "logging_steps": 50,
            "seed": seed,
        },
    }
    trainer = built(make_recipe("run", over))
    tokenizer, policy = trainer.processing_class, trainer.model.policy
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
    for model in (policy, trainer.play.collector.reference.module):
        allow_all_tokens(model)
        assert forbid_tokens(model, [token for token in range(len(tokenizer)) if token not in letters])
    engine = trainer.play.collector.engine
    generate = engine.generate

    def always_ended(*args: Any, **kwargs: Any) -> Any:
        # Every reply is whole: without this the value after it, of letters that never come, would be part of it.
        rollout = generate(*args, **kwargs)
        return type(rollout)(
            response_ids=rollout.response_ids, logprobs=rollout.logprobs, ended=[True] * len(rollout.ended)
        )

    engine.generate = always_ended
    monkeypatch.setattr(ppo_collect, "refuse_wrong_ends", lambda *_: None)  # which would name just that
    prompt = trainer.prompt_rows[0]["prompt_ids"]
    replies = list(itertools.product(letters, repeat=LENGTH))
    reference = distribution(policy.eval(), prompt, replies)
    assert float(reference.sum()) == pytest.approx(1, abs=1e-5)
    scorer = trainer.play.collector.rewards.terms[0].scorer
    rewards = torch.tensor(scorer.function(prompts=[], replies=[tokenizer.decode(r) for r in replies], extras=[]))
    optimum = reference * (rewards / BETA).exp()
    optimum = optimum / optimum.sum()
    assert 0.5 * float((optimum - reference).abs().sum()) > 0.2, "the optimum must be far from the start"
    trainer.train()
    reached = distribution(policy.eval(), prompt, replies)
    tv = 0.5 * float((optimum - reached).abs().sum())
    print("TV", seed, tv, len(prompt))
    assert tv < 0.05
