"""A fused model is the model: same logits, gradients, copies and files; what only looks alike keeps its own way."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import make_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from chatalign.engine import fused_layers
from chatalign.engine.fused_layers import fuse_layers
from chatalign.maths import fused

from .fused_twins import ALL, IDS, VOCABULARY, add_lora, assert_close, fused_modules, make_model, results

ROTARY = "apply_rotary_pos_emb"
# Two layers: two norms each and a last one, two of queries and keys in Qwen 3, and a gated unit each.
FUSED = {"llama": 7, "qwen2": 7, "qwen3": 11, "mistral": 7}
LOOK_ALIKES = ("gemma", "gemma2", "gpt2", "gpt_neox", "seed_oss", "phi3")


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q_turned, k_turned = (torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) for x in (q, k))
    return q * cos + q_turned * sin, k * cos + k_turned * sin


@pytest.fixture(autouse=True)
def _unfused_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier test may have fused the function, which is a global of its modeling file; each test puts it back."""
    for name, config in ALL.items():
        model_class = type(AutoModelForCausalLM.from_config(config))
        modeling: Any = sys.modules[model_class.__module__]
        if name in (*FUSED, "gemma", "gemma2"):
            monkeypatch.setattr(modeling, ROTARY, plain_rotary)
        elif hasattr(modeling, ROTARY):
            monkeypatch.setattr(modeling, ROTARY, getattr(modeling, ROTARY))


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_is_its_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name)
    before = results(model)
    assert fuse_layers(model) == FUSED[name]
    assert getattr(sys.modules[type(model).__module__], ROTARY) is fused_layers.apply_rotary
    calls: dict[str, int] = {}
    for part in ("rms_norm", "rotary", "swiglu", "swiglu_linear"):
        own = getattr(fused, part)

        def counted(*args: Any, _own: Any = own, _part: str = part) -> Tensor:
            calls[_part] = calls.get(_part, 0) + 1
            return _own(*args)

        monkeypatch.setattr(fused, part, counted)
    after = results(model)
    assert calls == {"rms_norm": FUSED[name] - 2, "rotary": 4, "swiglu_linear": 2}
    assert_close(after, before)


def test_what_is_done_to_the_last_product_of_a_gated_unit_is_still_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    fuse_layers(model)
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    seen: list[int] = []
    first.register_forward_hook(lambda _module, _inputs, output: output * 0)
    second.weight.requires_grad_(False)
    monkeypatch.setattr(fused, "swiglu_linear", lambda *_: seen.append(1))
    x = torch.randn(1, 3, 32)
    assert not model.model.layers[0].mlp(x).any()
    assert model.model.layers[1].mlp(x).any()
    assert seen == []


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_what_only_looks_alike_keeps_its_own(name: str) -> None:
    model = make_model(name)
    before = results(model)
    fuse_layers(model)
    assert not [module for module in fused_modules(model) if "norm" in module and name.startswith(("gem", "gp"))]
    assert not [module for module in fused_modules(model) if module.endswith("mlp")]
    assert_close(results(model), before)


@pytest.mark.parametrize("name", ["gpt_neox", "phi3"])
def test_a_rotary_embedding_of_a_part_of_the_head_is_not_touched(name: str) -> None:
    modeling: Any = sys.modules[type(make_model(name)).__module__]
    own = getattr(modeling, ROTARY)
    fuse_layers(make_model(name))
    assert getattr(modeling, ROTARY) is own


def test_a_dropout_of_the_gated_unit_is_seen_in_eval_too() -> None:
    model = make_model("seed_oss")
    fuse_layers(model.eval())
    assert not model.training
    assert not any(module.training for module in model.modules())
    mlp = model.train().model.layers[0].mlp
    assert not mlp(torch.randn(1, 50, 32)).all()


class _ShiftedNorm(nn.Module):
    """Gemma's norm with Llama's names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(16)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class _GateMayBeLeftOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * gate.sigmoid()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


def test_norms_that_only_look_alike_keep_their_own() -> None:
    norms = nn.ModuleList(
        [_ShiftedNorm(), _GateMayBeLeftOut(), CohereLayerNorm(16), Qwen3NextRMSNormGated(16), nn.LayerNorm(16)]
    )
    assert fuse_layers(norms) == 0
    assert fuse_layers(nn.ModuleList([modeling_llama.LlamaRMSNorm(16)])) == 1


def test_models_without_weights_here_keep_their_own() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ALL["llama"])
    assert fuse_layers(model) == 0


def test_the_rotary_function_of_another_modeling_file_is_not_touched() -> None:
    fuse_layers(make_model("llama"))
    assert modeling_llama.apply_rotary_pos_emb is fused_layers.apply_rotary
    assert modeling_mistral.apply_rotary_pos_emb is plain_rotary


def test_again_changes_nothing() -> None:
    model = make_model("llama")
    fuse_layers(model)
    forwards = {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}
    before = results(model)
    assert fuse_layers(model) == 0
    for name, module in model.named_modules():
        assert vars(module).get("forward") is forwards.get(name)
    after = results(model)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in before[1].items())


def test_fusing_draws_no_random_number_and_moves_no_weight() -> None:
    model = make_model("llama").train()
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fuse_layers(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())


def test_a_deep_copy_runs_its_own_weights() -> None:
    model = add_lora(make_model("llama"))
    fuse_layers(model)
    twin = copy.deepcopy(model)
    before = results(twin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    after = results(twin)
    assert torch.equal(after[0], before[0])
    assert not results(model)[0].any()
    assert len(fused_modules(twin)) == len(fused_modules(model)) > 0


def test_a_fused_model_is_saved_and_reloaded_as_ever(tmp_path: Path) -> None:
    model = make_model("qwen2")
    before = results(model)
    fuse_layers(model)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert fused_modules(again) == []
    assert_close(results(again), before)
    lora = add_lora(again)
    with_adapter = results(lora)
    fuse_layers(lora)
    lora.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert_close(results(reloaded), with_adapter)
    torch.testing.assert_close(
        results(lora.merge_and_unload().requires_grad_())[0], with_adapter[0], atol=1e-5, rtol=1e-5
    )


# Precision


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [None, "half", "fp32"])
def test_weights_in_half_precision_fall_back(
    dtype: torch.dtype, when: str, adapter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama").to(dtype)
    if adapter is not None:
        model = add_lora(model, adapter_in_fp32=adapter == "fp32")
    before = results(model)
    dtypes = [p.dtype for p in model.parameters()]
    if when == "before":  # fused while in fp32, rounded afterwards
        model.float()
    fuse_layers(model)
    for parameter, own in zip(model.parameters(), dtypes, strict=True):
        parameter.data = parameter.data.to(own)
    gated = [name for name in fused_modules(model) if name.endswith("mlp")]
    assert len(gated) == (2 if when == "before" else 0)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("not in half precision")

    monkeypatch.setattr(fused, "rms_norm", refuse)
    monkeypatch.setattr(fused, "lora_linear", refuse)
    after = results(model)
    assert after[0].dtype == dtype
    spread = float(before[0].float().std())
    gap = float((after[0] - before[0]).float().abs().max())
    assert gap < 0.1 * spread  # the rotary embedding and a gated unit that was fused in fp32 round once, not thrice


@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_norms_before_linear_layers_round_under_autocast(autocast: bool) -> None:
    model = make_model("qwen3")
    fuse_layers(model)
    dtypes: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda _m, _i, out, name=name: dtypes.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(input_ids=IDS)
    rounded = {
        name for name, dtype in dtypes.items() if dtype == torch.bfloat16 and not name.endswith(("q_norm", "k_norm"))
    }
    expected = {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")}
    assert rounded == (expected if autocast else set())
    assert dtypes["model.norm"] == torch.float32


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_under_autocast_a_fused_model_is_as_near_to_fp32_as_its_twin(name: str) -> None:
    model = add_lora(make_model(name))
    exact = results(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = results(model)
        fuse_layers(model)
        after = results(model)
    assert after[0].dtype == before[0].dtype
    assert [x.dtype for x in after[1].values()] == [x.dtype for x in before[1].values()]
    for pick in (lambda found: found[0].float(), lambda found: torch.cat([x.flatten() for x in found[1].values()])):
        ours, theirs, truth = map(pick, (after, before, exact))
        assert (ours - truth).norm() < 1.2 * (theirs - truth).norm()
        assert (theirs - truth).norm() < 0.1 * truth.norm()


def test_a_fused_model_generates_as_before() -> None:
    model = make_llama(VOCABULARY).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:, :4]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    fuse_layers(model)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), expected)
