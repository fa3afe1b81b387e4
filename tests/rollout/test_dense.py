"""One matrix a layer for a rollout: the same distribution, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from chatalign.rollout import Sampling, TransformersRollout
from chatalign.rollout.dense import dense_weights

PROMPTS = [[5, 6, 8], [9], [12, 4, 13, 6, 8, 17, 20]]
SAMPLING = Sampling(max_new_tokens=12, stop_token_ids=(3,), temperature=0.7, seed=1)


def adapted(**more: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=40, initializer_range=0.3))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **more))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def forwards(model: Any) -> list[Any]:
    return [vars(module).get("forward") for module in model.modules()]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_logits_are_the_adapters_and_every_layer_is_as_before(use_dora: bool, disabled: bool) -> None:
    model = adapted(use_dora=use_dora)
    if disabled:
        model.base_model.disable_adapter_layers()
    before, expected = forwards(model), logits(model)
    with dense_weights(model):
        changed = forwards(model) != before
        found = logits(model)
    assert changed is not use_dora
    assert forwards(model) == before
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_replies_carry_the_log_probabilities_of_the_adapted_model() -> None:
    model = adapted()
    rollout = TransformersRollout(model, 0).generate(PROMPTS, SAMPLING)
    for prompt, reply, logps in zip(PROMPTS, rollout.response_ids, rollout.logprobs, strict=True):
        with torch.no_grad():
            whole = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = whole.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(logps), expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_weight_is_rounded_once_and_gives_the_same_product() -> None:
    model = adapted()
    head = model.get_output_embeddings()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.randn(3, 32)
        expected = head(hidden)
        with dense_weights(model):
            assert "forward" in vars(head)
            assert torch.equal(head(hidden), expected)
    assert "forward" not in vars(head)


def test_weights_that_train_are_left_alone() -> None:
    model = adapted().merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16), dense_weights(model):
        assert not [module for module in model.modules() if "forward" in vars(module)]


def test_an_error_leaves_nothing_behind() -> None:
    model = adapted()
    before = forwards(model)
    with pytest.raises(ZeroDivisionError), dense_weights(model):
        _ = 1 / 0
    assert forwards(model) == before
