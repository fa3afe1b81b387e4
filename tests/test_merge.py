"""Merged models reply as their adapters do, or are not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import chatalign.merge
from chatalign.errors import ModelError
from chatalign.merge import merge
from chatalign.models.adapters import load_inference, load_policy, save_model
from chatalign.models.heads import load_reward_model, new_reward_model
from chatalign.models.load import load_tokenizer
from chatalign.recipe import ModelSection, validate_stage

IDS = torch.arange(4, 40)[None]
LORA = {"r": 4, "lora_alpha": 8}


def train_adapter(base: Path, folder: Path, *, stage: str = "sft", lora: dict[str, Any] = LORA) -> Path:
    raw = {"stage": stage, "output_dir": "x", "data": {"datasets": [{"path": "x"}]}}
    recipe: Any = validate_stage(raw | {"model": {"name_or_path": str(base)}, "lora": lora}, where="test")
    tokenizer = load_tokenizer(recipe.model)
    loaded = load_policy(recipe, tokenizer) if stage == "sft" else new_reward_model(recipe, tokenizer)
    torch.manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_model(loaded.model, tokenizer, folder, base_ref=loaded.base_ref)
    return folder


def make_base(folder: Path, shape: Path, dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Path:
    config = AutoConfig.from_pretrained(shape)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    for path in shape.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    return folder


def greedy(folder: Path) -> torch.Tensor:
    section = ModelSection(name_or_path=str(folder))
    model = load_inference(section, load_tokenizer(section))
    return model.generate(IDS[:, :8], attention_mask=torch.ones(1, 8), max_new_tokens=24, do_sample=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
def test_merged_replies_equal_the_adapters(
    tied: bool, targets: str | list[str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", tiny_model_folder, tied=tied)
    adapter = train_adapter(base, tmp_path / "adapter", lora=LORA | {"target_modules": targets})
    merged = merge(adapter, tmp_path / "merged")
    assert not (merged / "adapter_config.json").exists()
    assert torch.equal(greedy(merged), greedy(adapter))
    assert not torch.equal(greedy(merged), greedy(base))
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()  # without chatalign
    ours = load_inference(
        ModelSection(name_or_path=str(adapter)), load_tokenizer(ModelSection(name_or_path=str(adapter)))
    )
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, ours(IDS).logits, atol=1e-4)


def test_stored_in_the_bases_precision_or_the_asked_one(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tiny_model_folder, torch.bfloat16)
    adapter = train_adapter(base, tmp_path / "adapter")
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / dtype, dtype=dtype), dtype="auto")
        assert {p.dtype for p in model.parameters()} == {expected}


def test_merged_reward_model_keeps_its_scores(tiny_model_folder: Path, tmp_path: Path) -> None:
    adapter = train_adapter(tiny_model_folder, tmp_path / "adapter", stage="reward")
    merged = merge(adapter, tmp_path / "merged")
    section = ModelSection(name_or_path=str(adapter))
    ours = load_reward_model(section, load_tokenizer(section)).model
    plain = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, ours(IDS).logits, atol=1e-4)


def test_merging_into_quantized_weights_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tiny_model_folder)
    adapter = train_adapter(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stored quantized"):
        merge(adapter, tmp_path / "merged")


def test_a_merge_that_changes_replies_is_not_kept(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", tiny_model_folder, tied=True)
    adapter = train_adapter(base, tmp_path / "adapter", lora=LORA | {"target_modules": ["lm_head"]})
    monkeypatch.setattr(chatalign.merge, "_untie_where_adapted", lambda model: None)  # what peft alone would do
    with pytest.raises(ModelError, match="nothing was written"):
        merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_cannot_be_merged_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter"):
        merge(tiny_model_folder, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ModelError, match="isn't empty"):
        merge(tiny_model_folder, tmp_path / "full")
