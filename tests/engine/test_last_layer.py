"""The last layer's MLP runs where it is read, and no number is another for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from chatalign.data.collate import collate_pairs, collate_sequences
from chatalign.engine import last_layer
from chatalign.engine.isolation import enable_segments
from chatalign.engine.last_layer import HALF_MULTIPLE, Places, places_read
from chatalign.engine.layers import checkpoint_layers, compile_layers, decoder_layers
from chatalign.engine.loss_head import enable_chunked_head, token_logprobs
from chatalign.engine.ppo_model import backbone, hidden_states
from chatalign.models.heads import SCORE, new_score_head, scores_at

from .fused_twins import add_lora, make_model
from .test_attention import _SIZES

_NARROWED = ["llama", "qwen2", "qwen3", "gemma", "mistral", "seed_oss"]
_OTHERS = ["gpt2", "gpt_neox", "gemma2", "phi3"]


def pairs() -> dict[str, Any]:
    # 46 tokens, 15 predicted, the ends of both prompts twice.
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (46,), generator=draw).split([20, 3, 5, 11, 5, 2])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return collate_pairs([dict(zip(names, (x.tolist() for x in ids[i : i + 3]), strict=True)) for i in (0, 3)])


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Meanwhile the last layer is the model's own."""
    layer = decoder_layers(model)[-1]
    narrowed = type(layer)
    layer.__class__ = narrowed.__base__
    try:
        yield
    finally:
        layer.__class__ = narrowed


def is_narrowed(model: nn.Module) -> bool:
    kinds = [hasattr(type(layer), last_layer._NARROWED) for layer in decoder_layers(model)]
    assert not any(kinds[:-1])
    return any(kinds)


def gradients(model: nn.Module, numbers: Tensor) -> list[Tensor]:
    model.zero_grad()
    (numbers * torch.linspace(-1, 2, len(numbers))).sum().backward()
    return [numbers.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], close: float = 1e-5) -> None:
    assert len(ours) == len(theirs) > 5
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm()) <= close * float(other.norm().clamp(min=1e-6))


def mlp_rows(model: nn.Module) -> list[int]:
    """The rows that each layer's MLP runs on, filled as it runs."""
    rows: list[int] = []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].shape[1]))
    return rows


def assert_reads_the_same(model: nn.Module) -> None:
    enable_segments(model)
    rows = mlp_rows(model)
    ours = gradients(model, token_logprobs(model, pairs())[0])
    with whole(model):
        assert_same(ours, gradients(model, token_logprobs(model, pairs())[0]))
    assert rows == [46, 15, 46, 46]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", _NARROWED)
def test_log_probabilities_and_gradients_are_the_whole_layers(name: str, lora: bool) -> None:
    model = make_model(name)
    if lora:
        add_lora(model)
    assert_reads_the_same(model)


@pytest.mark.parametrize("name", _OTHERS)
def test_a_layer_of_another_form_stays_as_it_is(name: str) -> None:
    model = make_model(name)
    enable_segments(model)
    assert not is_narrowed(model)


@pytest.mark.parametrize(("multiplier", "narrowed"), [(1.0, True), (0.5, False)])
def test_a_look_alike_is_told_by_its_results(multiplier: float, narrowed: bool) -> None:
    model = AutoModelForCausalLM.from_config(GraniteConfig(**_SIZES, residual_multiplier=multiplier))
    enable_segments(model)
    assert is_narrowed(model) is narrowed


class _WithDropout(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return nn.functional.dropout(super().forward(hidden_states, **kwargs), 0.5, self.training)


def test_a_layer_with_a_dropout_of_its_own_stays_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_SIZES))
    decoder_layers(model)[-1].__class__ = _WithDropout
    enable_segments(model)
    assert not is_narrowed(model)
    assert model.training
    assert all(module.training for module in model.modules())


def test_experts_see_the_rows_that_are_read() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**_SIZES, num_local_experts=4, router_jitter_noise=0.0))
    assert_reads_the_same(model)


def test_scores_and_values_are_the_whole_layers() -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(LlamaConfig(**_SIZES, num_labels=1))
    setattr(model, SCORE, new_score_head(32, seed=0))
    enable_segments(model)
    rows = mlp_rows(model)
    batch = pairs()
    places = batch["predict_positions"].flip(0)  # in any order
    values = hidden_states(backbone(model), batch, places)
    ours = gradients(model, torch.cat((scores_at(model, batch), values[:, 0])))
    assert rows == [46, 15, 46, 4]
    with whole(model):
        values = hidden_states(backbone(model), batch, places)
        assert_same(ours, gradients(model, torch.cat((scores_at(model, batch), values[:, 0]))))


@pytest.mark.parametrize("how", ["checkpointed", "in bf16", "chunked"])
def test_beside_other_levers(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "_MOST", 3)  # as if the row were long: in bf16 the places are 128
    monkeypatch.setattr("chatalign.engine.loss_head._PLAIN_LOGITS_BYTES", 0)
    half = how == "in bf16"
    context = torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext()
    model = make_model("llama").train()
    with context:
        enable_segments(model)
        if how == "checkpointed":
            checkpoint_layers(model, 2)
        if how == "chunked":
            assert enable_chunked_head(model)
        rows = mlp_rows(model)
        ours = gradients(model, token_logprobs(model, pairs())[0])
        assert rows[:2] == [46, HALF_MULTIPLE if half else 15]
        assert len(rows) == (4 if how == "checkpointed" else 2)
        with whole(model):
            assert_same(ours, gradients(model, token_logprobs(model, pairs())[0]), 0.02 if half else 1e-5)


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partialmethod

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    plain = make_model("llama")
    enable_segments(plain)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled)
    few = collate_sequences([[5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6]], [[20, 21], [22]])
    for batch in (pairs(), few):
        ours, theirs = (gradients(model, token_logprobs(model, batch)[0]) for model in (compiled, plain))
        assert_same(ours, theirs, 1e-4)


def test_a_copy_runs_its_own_weights() -> None:
    model = make_model("llama")
    enable_segments(model)
    twin = copy.deepcopy(model)
    before = token_logprobs(twin, pairs())[0].detach()
    with torch.no_grad():
        for parameter in decoder_layers(model)[-1].parameters():
            parameter.zero_()
    assert torch.equal(token_logprobs(twin, pairs())[0], before)
    assert not torch.allclose(token_logprobs(model, pairs())[0], before)


def test_where_most_places_are_read_the_layer_runs_whole() -> None:
    assert places_read(torch.arange(67), 100) is None
    assert places_read(torch.arange(66), 100) is not None
    model = make_model("llama")
    enable_segments(model)
    rows = mlp_rows(model)
    token_logprobs(model, collate_sequences([[5]], [[6, 7, 8, 9, 10]]))
    assert rows == [6, 6]
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)  # and so it does for who asks for nothing
    assert rows == [6, 6, 3, 3]


def test_nothing_is_read_where_nothing_is_a_target() -> None:
    places = places_read(torch.empty(0, dtype=torch.int64), 10)
    assert places is not None
    assert len(places.index) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(places_read(torch.empty(0, dtype=torch.int64), 10).index) == 0


def test_a_place_counts_once() -> None:
    places = Places.of(torch.tensor([4, 1, 4, 4, 0]), 6)
    assert places.once.sum() == 3
    assert sorted(places.index[places.once[:, 0]].tolist()) == [0, 1, 4]
