"""Every optimizer step of a rollout against an oracle: one reply at a time, loops over tokens, NumPy, no padding."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from .conftest import LORA, Make, built

GAMMA, LAM, BETA, CLIP, CLIP_VALUE, VF, ENTROPY, PENALTY = 0.9, 0.8, 0.3, 0.05, 0.1, 0.5, 0.02, 1.5
TEMPERATURE = 0.8
STOPS = list(range(3, 80))
OVER: dict[str, Any] = {
    "ppo": {
        "total_episodes": 8,
        "gamma": GAMMA,
        "lam": LAM,
        "kl_coef": BETA,
        "cliprange": CLIP,
        "cliprange_value": CLIP_VALUE,
        "vf_coef": VF,
        "entropy_coef": ENTROPY,
        "missing_eos_penalty": PENALTY,
        "temperature": TEMPERATURE,
        "value_init": "policy",
    },
    "train": {"learning_rate": 1e-2, "max_grad_norm": 0.0},
}


class Recorder(TrainerCallback):
    """Weights before each optimizer step and the gradients that it takes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.weights.append({name: p.detach().clone() for name, p in trained.items()})
        self.gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})


def alone(model: Any, prompt: list[int], reply: list[int], forbidden: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies (T,) and values (T + 1,) of one reply by itself, through plain attention."""
    ids = torch.tensor([prompt + reply])
    places = slice(len(prompt) - 1, len(prompt) + len(reply) - 1)
    logits = model.policy(input_ids=ids, use_cache=False).logits[0, places] / TEMPERATURE
    possible = logits[:, [token for token in range(logits.shape[1]) if token not in forbidden]].log_softmax(-1)
    entropy = -(possible.exp() * possible).sum(-1)
    logps = logits - (logits[:, :1] - possible[:, :1] if 0 not in forbidden else logits[:, -1:] - possible[:, -1:])
    trunk = model.value_trunk
    if trunk is None:
        flags = {name: p.requires_grad for name, p in model.policy.named_parameters()}
        model.policy.set_adapter("value")
        for name, parameter in model.policy.named_parameters():
            parameter.requires_grad_(flags[name])
        hidden = model.policy.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state[0]
        model.policy.set_adapter("default")
        for name, parameter in model.policy.named_parameters():
            parameter.requires_grad_(flags[name])
    else:
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
    values = hidden[len(prompt) - 1 :] @ model.value_head.weight[0] + model.value_head.bias
    return logps.gather(1, torch.tensor(reply)[:, None]).squeeze(1), entropy, values


def advantages_of(episode: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Schulman et al. (1506.02438), eq. 16, a token at a time."""
    logps, refs, values = episode["logps"], episode["refs"], episode["values"]
    rewards = [-BETA * (a - b) for a, b in zip(logps, refs, strict=True)]
    rewards[-1] += episode["score"] - (0.0 if episode["ended"] else PENALTY)
    advantages, following = [0.0] * len(rewards), 0.0
    next_value = 0.0 if episode["ended"] else values[-1]
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + GAMMA * next_value - values[t]
        following = delta + GAMMA * LAM * following
        advantages[t], next_value = following, values[t]
    return np.array(advantages), np.array(advantages) + np.array(values[:-1])


@pytest.mark.parametrize("lora", [None, LORA])
def test_each_step_is_the_oracles(make_recipe: Make, lora: dict[str, Any] | None) -> None:
    trainer = built(make_recipe("run", {**OVER, "lora": lora}), stop_ids=STOPS)
    model, schedule = trainer.model, trainer.play.schedule
    with torch.no_grad():  # values that differ, or half of the advantage would go untested
        model.value_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        model.value_head.bias.fill_(-0.2)
    model.value_from_zero = False
    start = copy.deepcopy(model)
    recorder = Recorder(model)
    trainer.add_callback(recorder)
    kept: list[Any] = []
    collect = trainer.play.collector.collect

    def spy(*args: Any, **named: Any) -> Any:
        kept.append(collect(*args, **named))
        return kept[-1]

    trainer.play.collector.collect = spy
    trainer.train()
    drawn = kept[0].episodes
    ended = [ids[-1] in STOPS for ids in drawn.response_ids]
    assert 0 < sum(ended) < len(ended), "the test needs replies that end and replies that are cut"
    assert drawn.ended.tolist() == ended

    episodes: list[dict[str, Any]] = []
    forbidden = trainer.play.sampling.forbidden_token_ids
    for prompt, reply, end in zip(drawn.prompt_ids, drawn.response_ids, ended, strict=True):
        with torch.no_grad():
            logps, _, values = (x.tolist() for x in alone(start, prompt, reply, forbidden))
        text = trainer.processing_class.decode(reply, skip_special_tokens=True)
        score = text.count("a") - 0.1 * len(text)
        # At the start the reference is the policy.
        episodes.append({"logps": logps, "refs": logps, "values": values, "score": score, "ended": end})
    raw = [advantages_of(episode) for episode in episodes]
    flat = np.concatenate([advantages for advantages, _ in raw])
    white = [(advantages - flat.mean()) / np.sqrt(flat.var() + 1e-8) for advantages, _ in raw]

    position, clipped = trainer.position.__class__(), 0
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    for step in range(schedule.steps):
        at_step = copy.deepcopy(start)
        for name, parameter in at_step.named_parameters():
            if name in recorder.weights[step]:
                parameter.data.copy_(recorder.weights[step][name])
        rows = schedule.minibatch_rows(position)
        tokens = sum(len(drawn.response_ids[row]) for row in rows)
        loss = torch.zeros(())
        for row in rows:
            logps, entropy, values = alone(at_step, drawn.prompt_ids[row], drawn.response_ids[row], forbidden)
            old, old_values = episodes[row]["logps"], episodes[row]["values"]
            for t in range(len(old)):
                ratio = (logps[t] - old[t]).exp()
                bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
                clipped += int(ratio != bounded)
                loss = loss - torch.minimum(ratio * white[row][t], bounded * white[row][t])
                target = raw[row][1][t]
                near = old_values[t] + (values[t] - old_values[t]).clamp(-CLIP_VALUE, CLIP_VALUE)
                loss = loss + VF * 0.5 * torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
                loss = loss - ENTROPY * entropy[t]
        loss = loss / tokens
        loss.backward()
        assert losses[step] == pytest.approx(float(loss), abs=2e-5)
        theirs = {name: p.grad for name, p in at_step.named_parameters() if p.grad is not None}
        assert theirs.keys() == recorder.gradients[step].keys()
        for name, ours in recorder.gradients[step].items():
            torch.testing.assert_close(ours, theirs[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        position = schedule.after(position)
    assert clipped > 0, "the test needs ratios outside the clip range"
