"""The flat layout gives each sequence what it gives alone, and a model that would mix them is refused."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from chatalign.engine.attention import ATTENTION, plan_segments, segment_inputs
from chatalign.engine.isolation import check_isolation, enable_segments
from chatalign.errors import GuardError, ModelError

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_WITH_HEAD_DIM = _SIZES | {"head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_WITH_HEAD_DIM),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1),
    "gemma": GemmaConfig(**_WITH_HEAD_DIM),
    "gemma2": Gemma2Config(**_WITH_HEAD_DIM, sliding_window=32, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
}
_DOCUMENTS = [[5, 9, 13, 2, 7], [3, 4], [11, 12, 8, 30, 31, 33, 40], [50, 3]]
_PROMPT, _CHOSEN, _REJECTED = [5, 6, 7, 8], [20, 21, 22], [30, 31, 32, 33, 34]


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    with torch.no_grad():  # init leaves attention near uniform, which would hide a wrong mask
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.eval()


def flat(documents: list[list[int]]) -> dict[str, Any]:
    ends = torch.tensor([0] + [len(document) for document in documents]).cumsum(0).tolist()
    return {
        "input_ids": torch.tensor([[*chain.from_iterable(documents)]]),
        "position_ids": torch.tensor([[i for document in documents for i in range(len(document))]]),
        "segments": torch.tensor([[a, b, 0, 0] for a, b in pairwise(ends)], dtype=torch.int32),
    }


def flat_pair() -> dict[str, Any]:
    p, c, r = len(_PROMPT), len(_CHOSEN), len(_REJECTED)
    table = [[0, p, 0, 0], [p, p + c, 0, p], [p + c, p + c + r, 0, p]]
    return {
        "input_ids": torch.tensor([_PROMPT + _CHOSEN + _REJECTED]),
        "position_ids": torch.tensor([[*range(p + c), *range(p, p + r)]]),
        "segments": torch.tensor(table, dtype=torch.int32),
    }


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_and_pairs_are_as_alone(name: str) -> None:
    model = make_model(name)
    with torch.no_grad():  # alone: eager, so that the entry is held to another implementation
        documents = torch.cat([alone(model, document) for document in _DOCUMENTS])
        chosen, rejected = alone(model, _PROMPT + _CHOSEN), alone(model, _PROMPT + _REJECTED)
        enable_segments(model)
        assert model.config._attn_implementation == ATTENTION
        packed = model(**segment_inputs(flat(_DOCUMENTS))).logits[0]
        pair = model(**segment_inputs(flat_pair())).logits[0]
    torch.testing.assert_close(packed, documents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pair[:7], chosen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pair[7:], rejected[4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_gradients_of_a_pair_are_those_of_two_rows(name: str) -> None:
    model = make_model(name)
    enable_segments(model)
    model(**segment_inputs(flat_pair())).logits[0, [3, 4, 7, 8]].square().sum().backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chosen, rejected = alone(model, _PROMPT + _CHOSEN), alone(model, _PROMPT + _REJECTED)
    (chosen[[3, 4]].square().sum() + rejected[[4, 5]].square().sum()).backward()
    for name_, parameter in model.named_parameters():
        if name_ in shared:
            torch.testing.assert_close(shared[name_], parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generation_and_padding_are_as_before(name: str) -> None:
    model = make_model(name)
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    ids = torch.tensor([[0, 0, 5, 9, 13], [4, 6, 8, 10, 12]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **settings)
    enable_segments(model)
    assert torch.equal(model.generate(**inputs, **settings), expected)


def test_half_precision_passes_the_self_check() -> None:
    check_model = make_model("qwen3").to(torch.bfloat16)
    enable_segments(check_model)


def test_a_sequence_longer_than_the_sliding_window_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(MistralConfig(**_SIZES, sliding_window=20))
    enable_segments(model)
    with pytest.raises(ModelError, match="sliding window of 20"):
        model(**segment_inputs(flat([list(range(2, 23))])))


def test_a_model_that_drops_the_segments_is_refused() -> None:
    model = make_model("llama")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, _forward=forward, segments=None, **kwargs: _forward(*args, **kwargs)
    with pytest.raises(GuardError, match="its layers ran the attention transformers' own"):
        enable_segments(model)


def test_a_model_that_looks_across_tokens_elsewhere_is_refused() -> None:
    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) + 0.1 * hidden.cumsum(1)
    with pytest.raises(ModelError, match="mixes the documents"):
        enable_segments(model)


def test_a_model_without_the_attention_interface_is_refused() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="can't run a packed row"):
        enable_segments(AutoModelForCausalLM.from_config(config))


def test_the_check_leaves_the_training_flag_alone() -> None:
    model = make_model("llama").train()
    enable_segments(model)
    check_isolation(model)
    assert model.training


@pytest.mark.parametrize(
    "table",
    [
        [[0, 3, 0, 0], [4, 6, 0, 0]],
        [[0, 3, 0, 0], [3, 6, 0, 2]],
        [[0, 3, 3, 6], [3, 6, 0, 0]],
        [[0, 3, 0, 0]],
    ],
    ids=["gap", "part of a segment", "later segment", "too short"],
)
def test_malformed_segment_tables_are_refused(table: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="segment"):
        plan_segments(torch.tensor(table), 6)
