"""The hand-off from stage to stage: what is trained, what it is held to, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import IDS, LORA, QLORA, another_llama, logits, make_recipe, train_a_little, train_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatalign.errors import ModelError, RecipeError
from chatalign.models.adapters import attach_adapter, load_inference, load_policy, save_model
from chatalign.models.load import load_tokenizer
from chatalign.models.reference import adapter_in_use, hash_tensors
from chatalign.recipe import ModelSection


def open_policy(stage: str, start: Path, **sections: Any) -> Any:
    recipe = make_recipe(stage, start, **sections)
    return load_policy(recipe, load_tokenizer(recipe.model))


@pytest.fixture
def adapter_copy(tmp_path: Path, sft_adapter: Path) -> Path:
    return Path(shutil.copytree(sft_adapter, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("start", "sections", "way"),
    [
        ("adapter", {}, "adapter"),
        ("adapter", {"lora": LORA}, "adapter"),
        ("adapter", {"quantization": QLORA}, "adapter"),
        ("adapter", {"quantization": {"load_in_8bit": True}}, "adapter"),
        ("base", {"lora": LORA}, "disabled"),
        ("base", {"lora": LORA, "quantization": QLORA}, "disabled"),
        ("base", {}, "copy"),
    ],
)
def test_reference_is_the_start_and_stays(
    start: str, sections: dict[str, Any], way: str, sft_adapter: Path, tiny_model_folder: Path
) -> None:
    policy = open_policy("dpo", sft_adapter if start == "adapter" else tiny_model_folder, **sections)
    assert policy.reference.way == way
    assert policy.is_adapter == (way != "copy")
    before, flags = logits(policy.model), [p.requires_grad for p in policy.model.parameters()]
    with policy.reference.use() as reference:
        assert torch.equal(logits(reference), before)
        assert not reference.training
    assert [p.requires_grad for p in policy.model.parameters()] == flags
    sha256 = policy.reference.sha256()
    train_a_little(policy.model)
    assert policy.reference.sha256() == sha256
    with policy.reference.use() as reference:
        assert torch.equal(logits(reference), before)
    assert not torch.allclose(logits(policy.model), before)


def test_reference_keeps_train_mode_and_gradients_of_the_policy(sft_adapter: Path) -> None:
    policy = open_policy("dpo", sft_adapter)
    loss = policy.model(IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="inside"), policy.reference.use():
        raise RuntimeError("inside")
    assert policy.model.training
    assert policy.model.active_adapter == "default"
    loss.backward()
    assert all(p.grad is not None for p in policy.model.parameters() if p.requires_grad)
    assert all(p.grad is None for n, p in policy.model.named_parameters() if ".reference." in n)


def test_handed_on_adapter_is_not_the_base(sft_adapter: Path, tiny_model_folder: Path) -> None:
    policy = open_policy("dpo", sft_adapter)
    start = logits(policy.model)
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32))
    assert not torch.allclose(start, base)
    with adapter_in_use(policy.model, None) as without:
        assert torch.allclose(logits(without), base)
    assert torch.equal(logits(policy.model), start)


def rows(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def test_qlora_trains_only_float32_adapters_on_4_bit_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe("sft", tiny_model_folder, lora=LORA, quantization=QLORA)
    tokenizer = load_tokenizer(recipe.model)
    policy = load_policy(recipe, tokenizer)
    layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.dtype == torch.uint8
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {n: p for n, p in policy.model.named_parameters() if not p.requires_grad}
    sha256 = hash_tensors(frozen)
    train_a_little(policy.model)
    assert hash_tensors(frozen) == sha256
    after = logits(policy.model)
    save_model(policy.model, tokenizer, tmp_path / "model")
    again = open_policy("sft", tmp_path / "model", lora=LORA, quantization=QLORA)
    assert torch.equal(logits(again.model), after)


def test_new_adapters_depend_on_the_seed_alone(tiny_model_folder: Path) -> None:
    def weights(seed: int) -> str:
        torch.rand(seed)  # the global generator's place must not matter
        model = open_policy("sft", tiny_model_folder, lora=LORA, train={"seed": seed}).model
        return hash_tensors({n: p for n, p in model.named_parameters() if "lora_A" in n})

    assert weights(1) == weights(1) != weights(2)


def test_adapter_on_another_base_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    base = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    adapter = train_adapter(base, tmp_path / "adapter")
    another_llama(base, seed=1).save_pretrained(base)
    with pytest.raises(ModelError, match="trained on a base with sha256"):
        open_policy("dpo", adapter)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="is not there; put it back"):
        open_policy("dpo", adapter)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "cut off"])
def test_incomplete_adapter_is_refused(fault: str, adapter_copy: Path) -> None:
    path = adapter_copy / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if fault == "missing":
        tensors.pop(name)
    elif fault == "extra":
        tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    elif fault == "shape":
        tensors[name] = torch.zeros(4, 48)
    save_file(tensors, path)
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    expected = {
        "missing": "1 of the adapter's weights are missing",
        "extra": "no place",
        "shape": "shapes",
        "cut off": "damaged",
    }
    with pytest.raises(ModelError, match=expected[fault]) as refusal:
        open_policy("dpo", adapter_copy)
    assert str(adapter_copy) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("lora", "key"),
    [({"r": 8, "lora_alpha": 8}, "lora.r"), (LORA | {"target_modules": ["q_proj"]}, "lora.target_modules")],
)
def test_lora_that_contradicts_the_adapter_is_refused(lora: dict[str, Any], key: str, sft_adapter: Path) -> None:
    with pytest.raises(RecipeError, match=key):
        open_policy("dpo", sft_adapter, lora=lora)


def test_dropout_is_off_where_logprobs_are_compared(sft_adapter: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    another_llama(tiny_model_folder, seed=0, attention_dropout=0.5).save_pretrained(noisy)
    load_tokenizer(ModelSection(name_or_path=str(tiny_model_folder))).save_pretrained(noisy)
    model = open_policy("dpo", noisy).model.train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="lora_dropout"):
        open_policy("ppo", sft_adapter, lora=LORA | {"lora_dropout": 0.1}, ppo={"rewards": [{"function": "a.py:b"}]})


def test_half_precision_is_refused_where_it_would_be_trained(tiny_model_folder: Path) -> None:
    model = {"name_or_path": str(tiny_model_folder), "dtype": "bfloat16"}
    with pytest.raises(ModelError, match="loses small updates"):
        open_policy("sft", tiny_model_folder, model=model)
    with pytest.raises(ModelError, match=r"lm_head.*bfloat16"):
        open_policy("sft", tiny_model_folder, model=model, lora=LORA | {"modules_to_save": ["lm_head"]})
    policy = open_policy("sft", tiny_model_folder, model=model, lora=LORA)
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}


def test_gradient_checkpointing_reaches_every_adapter(tiny_model_folder: Path) -> None:
    model = open_policy("sft", tiny_model_folder, lora=LORA, train={"gradient_checkpointing": True}).model
    model.gradient_checkpointing_enable({"use_reentrant": True})
    train_a_little(model, steps=2)
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_full_model_round_trip(tiny_model_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe("sft", tiny_model_folder)
    tokenizer = load_tokenizer(recipe.model)
    policy = load_policy(recipe, tokenizer)
    assert not policy.is_adapter
    assert policy.reference is None
    train_a_little(policy.model)
    save_model(policy.model, tokenizer, tmp_path)
    again = load_inference(ModelSection(name_or_path=str(tmp_path)), tokenizer)
    assert torch.equal(logits(again), logits(policy.model))
    assert not any(path.suffix in (".bin", ".pt") for path in tmp_path.iterdir())


def test_new_model_from_a_configuration(tiny_model_folder: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = {"config": config, "tokenizer_name_or_path": str(tiny_model_folder)}
    first, second = (open_policy("pretrain", tiny_model_folder, model=model).model for _ in range(2))
    assert first.config.vocab_size == rows(tiny_model_folder)
    assert torch.equal(logits(first), logits(second))
    with pytest.raises(ModelError, match="embedding rows"):
        open_policy("pretrain", tiny_model_folder, model=model | {"config": config | {"vocab_size": 10}})


def test_more_adapters_hang_on_one_backbone(sft_adapter: Path) -> None:
    policy = open_policy("dpo", sft_adapter)
    trainable = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    start = logits(policy.model)
    attach_adapter(policy.model, sft_adapter, "value", trainable=True, heads=False)
    now = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert now - trainable == {n.replace(".default.", ".value.") for n in trainable}
    assert trainable <= now
    with adapter_in_use(policy.model, "value") as model:
        assert torch.equal(logits(model), start)
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == now


def test_wrong_kinds_are_named(tmp_path: Path, adapter_copy: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_policy("dpo", tmp_path)
    config = json.loads((adapter_copy / "adapter_config.json").read_text())
    (adapter_copy / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    with pytest.raises(ModelError, match="a reward adapter, not a language model"):
        open_policy("dpo", adapter_copy)
    with pytest.raises(ModelError, match="no such model folder"):
        open_policy("dpo", tmp_path / "nothing")
