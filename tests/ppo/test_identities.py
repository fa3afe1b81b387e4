"""What must not matter: tokens after EOS, padding, how a step is cut into micro-batches, and which engine decodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from chatalign.data.collate import collate_sequences
from chatalign.engine.ppo_experience import Experience, make_experience
from chatalign.maths import policy_loss, value_loss
from chatalign.rollout import Rollout, Sampling, transformers_engine

from .conftest import LORA, Make, built
from .test_removed_trainer_rollouts import REPLIES, collected, likely_to_end

ROLES = [{"lora": LORA}, {"lora": None}, {"lora": LORA, "ppo": {"value": "shared"}}]


def with_values(trainer: Any) -> Any:
    """The trainer with values that differ from state to state, and replies some of which end."""
    with torch.no_grad():
        trainer.model.value_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return likely_to_end(trainer) if trainer.play.collector.reference.module is not None else trainer


def moved(trainer: Any) -> Any:
    """The trainer after an update's worth of noise, so that ratios and clipped values are no longer trivial."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:  # a LoRA matrix counts by its product with another, as small
                scale = 0.3 if "lora_" in name else 0.03
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return trainer


def step(trainer: Any, made: Experience, size: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step over all replies, `size` a forward pass."""
    trainer.model.zero_grad()
    total, items = 0.0, len(made.old_logps)
    for start in range(0, len(made), size):
        batch = trainer._batch(made, list(range(len(made)))[start : start + size], fresh=False)
        loss, _ = trainer.objective(trainer.model, batch, items)
        loss.backward()
        total += float(loss.detach())
    named = trainer.model.named_parameters()
    return total, {name: p.grad.clone() for name, p in named if p.grad is not None}


def same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_noise_after_eos_changes_no_loss_metric_or_gradient(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, found = transformers_engine.cut_at_stops, []

    def noisy(tokens: Tensor, logps: Tensor, sampler: Any) -> Any:
        stopped = sampler.stops(tokens).cumsum(1)
        behind = torch.nn.functional.pad(stopped, (1, 0))[:, : tokens.shape[1]] > 0
        generator = torch.Generator().manual_seed(len(found))
        noise = torch.randint(4, 300, tokens.shape, generator=generator)
        return cut(torch.where(behind, noise, tokens), torch.where(behind, torch.nan, logps), sampler)

    for kind in (cut, noisy):
        monkeypatch.setattr(transformers_engine, "cut_at_stops", kind)
        trainer = likely_to_end(built(make_recipe("run", {"ppo": {"response_length": 12}})), bonus=4.0)
        trainer.train()
        lines = [
            {name: value for name, value in line.items() if "speed" not in name and "time" not in name}
            for line in trainer.state.log_history
            if "loss" in line
        ]
        found.append((lines, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}))
    assert 0 < found[0][0][0]["reply/eos_rate"] < 1
    for mine, yours in zip(found[0][0], found[1][0], strict=True):
        assert {k: v for k, v in mine.items() if "per_s" not in k} == {
            k: v for k, v in yours.items() if "per_s" not in k
        }
    assert all(torch.equal(weight, found[1][1][name]) for name, weight in found[0][1].items())


@pytest.mark.parametrize("over", ROLES)
def test_the_flat_batch_is_the_padded_rectangle(make_recipe: Make, over: dict[str, Any]) -> None:
    """Right-padded rows with a mask, through plain attention, next to packed segments: the same step."""
    trainer = with_values(built(make_recipe("run", over)))
    made = make_experience(collected(trainer), trainer.section, kl_coef=0.05)
    moved(trainer)
    packed, _ = step(trainer, made, REPLIES)
    rows = [prompt + reply for prompt, reply in zip(made.prompt_ids, made.response_ids, strict=True)]
    width = max(map(len, rows)) + 3
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    model = trainer.model
    kept = torch.zeros(ids.shape, dtype=torch.bool)  # the places that predict a response token
    for row, (prompt, reply) in enumerate(zip(made.prompt_ids, made.response_ids, strict=True)):
        kept[row, len(prompt) - 1 : len(prompt) + len(reply) - 1] = True
    with torch.no_grad():
        out = model.policy(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        hidden = out.hidden_states[-1]
        if model.value_trunk is not None:
            hidden = model.value_trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        elif model.value_adapter is not None:
            with model._adapters.use(model.value_adapter):
                hidden = model.get_base_model().model(input_ids=ids, attention_mask=mask).last_hidden_state
    logps = out.logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)[kept[:, :-1]]
    values = model.value_head(hidden)[kept]
    everything = torch.ones_like(logps, dtype=torch.bool)
    policy = policy_loss(
        logps_BT=logps, old_logps_BT=made.old_logps, advantages_BT=made.advantages, mask_BT=everything,
        clip_range=trainer.section.cliprange,
    )  # fmt: skip
    value = value_loss(
        values_BT=values, old_values_BT=made.old_values, returns_BT=made.returns, mask_BT=everything,
        clip_range=trainer.section.cliprange_value,
    )  # fmt: skip
    assert packed == pytest.approx(float(policy.loss + trainer.section.vf_coef * value.loss), abs=1e-5)
    flat = trainer.model(collate_sequences(made.prompt_ids, made.response_ids))
    torch.testing.assert_close(flat.logps, logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.values, values, rtol=0, atol=1e-5)
    assert 0 < float(policy.clipfrac) < 1, "the step must have clipped tokens"


@pytest.mark.parametrize("over", ROLES)
def test_a_step_in_pieces_is_the_step(make_recipe: Make, over: dict[str, Any]) -> None:
    trainer = with_values(built(make_recipe("run", over)))
    made = make_experience(collected(trainer), trainer.section, kl_coef=0.05)
    moved(trainer)
    whole = step(trainer, made, REPLIES)
    for size in (1, 3):
        same(step(trainer, made, size), whole)


class OneByOne:
    """Another engine: transformers' own greedy ``generate``, a prompt at a time, and a plain pass for its numbers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, prompt_ids: Any, sampling: Sampling, *, row_seeds: Any = None) -> Rollout:
        replies, numbers = [], []
        for prompt in prompt_ids:
            ids = torch.tensor([list(prompt)])
            drawn = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=list(sampling.stop_token_ids),
                pad_token_id=0,
            )
            with torch.no_grad():
                logps = self.model(input_ids=drawn, use_cache=False).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
            replies.append(drawn[0, ids.shape[1] :].tolist())
            numbers.append(logps.gather(1, drawn[0, ids.shape[1] :, None]).squeeze(1).tolist())
        ended = [reply[-1] in sampling.stop_token_ids for reply in replies]
        return Rollout(response_ids=replies, logprobs=numbers, ended=ended)


@pytest.mark.parametrize("over", ROLES)
def test_two_engines_one_loss(make_recipe: Make, over: dict[str, Any]) -> None:
    trainer = with_values(built(make_recipe("run", over)))
    results = []
    start = [p.detach().clone() for p in trainer.model.parameters()]
    for engine in (trainer.play.collector.engine, OneByOne(trainer.model.policy)):
        with torch.no_grad():
            for parameter, before in zip(trainer.model.parameters(), start, strict=True):
                parameter.copy_(before)
        trainer.play.collector.engine = engine
        drawn = collected(trainer, temperature=0.0)
        made = make_experience(dataclasses.replace(drawn), trainer.section, kl_coef=0.05)
        results.append((drawn.response_ids, made.metrics, step(moved(trainer), made, REPLIES)))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert results[1][1][name] == pytest.approx(value, abs=1e-5, nan_ok=True), name
    same(results[0][2], results[1][2])
