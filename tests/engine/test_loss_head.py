"""The chunked head gives the plain head's numbers and gradients; models that change their logits keep the plain one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_llama
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from chatalign.data.collate import collate_lm
from chatalign.engine import loss_head
from chatalign.engine.isolation import enable_segments
from chatalign.engine.loss_head import enable_chunked_head, sum_of_logprobs, token_logprobs

from .stand_ins import VOCABULARY, lm_rows


def batch() -> dict[str, Any]:
    return collate_lm(list(lm_rows(5)))


def results(model: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    model.zero_grad()
    logps, entropy = token_logprobs(model, batch(), temperature=0.7, **options)
    weight = torch.linspace(0.5, 1.5, len(logps))
    loss = (weight * logps).sum()
    if options.get("entropy_grad"):
        loss = loss + (weight * entropy).sum()
    loss.backward()
    return logps, entropy, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"entropy": True, "entropy_grad": True}])
def test_chunked_is_plain(options: dict[str, bool], lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(VOCABULARY)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    enable_segments(model)
    plain = results(model, **options)
    assert enable_chunked_head(model)
    monkeypatch.setattr(loss_head, "_PLAIN_LOGITS_BYTES", 0)
    calls = []
    chunked_linear_logprobs = loss_head.logprobs.chunked_linear_logprobs
    monkeypatch.setattr(
        loss_head.logprobs,
        "chunked_linear_logprobs",
        lambda *args, **kwargs: calls.append(1) or chunked_linear_logprobs(*args, **kwargs),
    )
    chunked = results(model, **options)
    assert calls == [1]
    torch.testing.assert_close(chunked[0], plain[0], atol=1e-5, rtol=1e-5)
    if options:
        torch.testing.assert_close(chunked[1], plain[1], atol=1e-5, rtol=1e-5)
    assert chunked[2].keys() == plain[2].keys()
    for name, gradient in plain[2].items():
        torch.testing.assert_close(chunked[2][name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_sum_is_that_of_the_tokens(lora: bool, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(VOCABULARY)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    enable_segments(model)
    assert enable_chunked_head(model)
    found = []
    for limit, total in ((10**9, sum_of_logprobs), (0, sum_of_logprobs), (0, lambda *a: token_logprobs(*a)[0].sum())):
        monkeypatch.setattr(loss_head, "_PLAIN_LOGITS_BYTES", limit)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = -total(model, batch()) / 7
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    close = {"atol": 2e-2, "rtol": 2e-2} if half else {"atol": 1e-5, "rtol": 1e-5}
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=close["rtol"])
        for ours, theirs in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, **close)


def test_entropy_carries_no_gradient_unless_asked() -> None:
    model = make_llama(VOCABULARY)
    enable_segments(model)
    assert not token_logprobs(model, batch(), entropy=True)[1].requires_grad
    assert token_logprobs(model, batch(), entropy=True, entropy_grad=True)[1].requires_grad


_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@pytest.mark.parametrize(
    "config", [Gemma2Config(**_SMALL, head_dim=8), CohereConfig(**_SMALL)], ids=["softcap", "logit scale"]
)
def test_models_that_change_their_logits_keep_the_plain_head(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(config)
    enable_segments(model)
    before = token_logprobs(model, batch())[0]
    assert not enable_chunked_head(model)
    monkeypatch.setattr(loss_head, "_PLAIN_LOGITS_BYTES", 0)
    assert torch.equal(token_logprobs(model, batch())[0], before)


def test_a_copy_of_the_model_runs_its_own_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(VOCABULARY)
    enable_segments(model)
    enable_chunked_head(model)
    monkeypatch.setattr(loss_head, "_PLAIN_LOGITS_BYTES", 0)
    twin = copy.deepcopy(model)
    before = token_logprobs(twin, batch())[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(token_logprobs(twin, batch())[0], before)


def test_the_output_layer_gives_logits_outside_token_logprobs() -> None:
    model = make_llama(VOCABULARY)
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    enable_chunked_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert set(model.state_dict()) == set(make_llama(VOCABULARY).state_dict())
