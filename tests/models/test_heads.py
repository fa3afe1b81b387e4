"""Reward models: the head is made, trained, saved and read back exactly, and scores belong to the last token."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import LORA, QLORA, another_llama, make_recipe
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from chatalign.data.collate import collate_pairs
from chatalign.engine.isolation import enable_segments
from chatalign.errors import ModelError
from chatalign.models.adapters import attach_adapter, load_inference, save_model
from chatalign.models.heads import (
    ScoreHead,
    active_head,
    load_reward_model,
    new_reward_model,
    new_score_head,
    scores_at,
)
from chatalign.models.load import load_tokenizer
from chatalign.models.reference import adapter_in_use
from chatalign.recipe import ModelSection, QuantizationSection

PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 3], "rejected_ids": [11, 3]},
    {"prompt_ids": [12, 13], "chosen_ids": [14, 3], "rejected_ids": [15, 16, 17, 18, 3]},
]
SEQUENCES = [row["prompt_ids"] + row[side] for row in PAIRS for side in ("chosen_ids", "rejected_ids")]


def train_reward_model(start: Path, folder: Path, **sections: Any) -> tuple[Any, torch.Tensor]:
    """Train for three steps on the pairs, save to `folder`; the model and its scores."""
    recipe = make_recipe("reward", start, **sections)
    tokenizer = load_tokenizer(recipe.model)
    reward = new_reward_model(recipe, tokenizer)
    enable_segments(reward.model)
    batch = collate_pairs(PAIRS)
    first = active_head(reward.model).weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in reward.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        scores = scores_at(reward.model, batch)
        torch.nn.functional.softplus(scores[1::2] - scores[::2]).mean().backward()
        assert all(p.grad is not None for p in reward.model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(first, active_head(reward.model).weight)
    save_model(reward.model, tokenizer, folder, base_ref=reward.base_ref)
    return reward.model, score_pairs(reward.model)


def score_pairs(model: Any) -> torch.Tensor:
    enable_segments(model)
    with torch.no_grad():
        return scores_at(model.eval(), collate_pairs(PAIRS))


@pytest.mark.parametrize(
    ("start", "sections"),
    [
        ("base", {}),
        ("base", {"lora": LORA}),
        ("adapter", {}),
        ("adapter", {"quantization": QLORA}),
        ("adapter", {"model": "bfloat16"}),
    ],
)
def test_fresh_reload_gives_equal_scores(
    start: str, sections: dict[str, Any], sft_adapter: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    place = str(sft_adapter if start == "adapter" else tiny_model_folder)
    dtype = sections.get("model", "auto")
    model, scores = train_reward_model(
        Path(place), tmp_path / "rm", **(sections | {"model": {"name_or_path": place, "dtype": dtype}})
    )
    assert scores.dtype == torch.float32
    assert scores.unique().numel() == 4
    assert isinstance(active_head(model), ScoreHead)
    section = ModelSection(name_or_path=str(tmp_path / "rm"), dtype=dtype)
    quantization = QuantizationSection(**QLORA) if "quantization" in sections else None
    again = load_reward_model(section, load_tokenizer(section), quantization=quantization)
    assert torch.equal(score_pairs(again.model), scores)
    assert not any(p.requires_grad for p in again.model.parameters())


@pytest.mark.parametrize("side", ["right", "left"])
def test_transformers_pooling_gives_our_scores(
    side: str, sft_adapter: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    _, scores = train_reward_model(sft_adapter, tmp_path / "rm")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=1)
    plain = PeftModel.from_pretrained(base, tmp_path / "rm").eval()
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tmp_path / "rm")), chat=True)
    batch = tokenizer.pad({"input_ids": SEQUENCES}, padding_side=side, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        padded = plain(**batch, position_ids=positions).logits[:, 0]
        alone = torch.cat([plain(torch.tensor([ids])).logits[:, 0] for ids in SEQUENCES])
    assert torch.allclose(padded, scores, atol=1e-5)
    assert torch.allclose(alone, scores, atol=1e-5)


def test_reward_adapter_starts_from_the_sft_adapter(sft_adapter: Path) -> None:
    recipe = make_recipe("reward", sft_adapter)
    reward = new_reward_model(recipe, load_tokenizer(recipe.model))
    saved = load_file(sft_adapter / "adapter_model.safetensors")
    ours = {n.replace(".default", ""): p for n, p in reward.model.named_parameters() if "lora_" in n}
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[name], saved[name]) for name in saved)


def test_new_head_is_small_and_float32_under_autocast() -> None:
    head = new_score_head(4095, seed=0)
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(torch.randn(2000, 4095, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32
    assert scores.unique().numel() > 1990


def test_language_models_are_not_taken_for_reward_models(sft_adapter: Path, tiny_model_folder: Path) -> None:
    for place, reason in ((sft_adapter, "no reward model"), (tiny_model_folder, "no `score` weights")):
        section = ModelSection(name_or_path=str(place))
        with pytest.raises(ModelError, match=reason):
            load_reward_model(section, load_tokenizer(section))


def test_reward_adapter_without_its_head_is_refused(sft_adapter: Path, tmp_path: Path) -> None:
    train_reward_model(sft_adapter, tmp_path / "rm")
    path = tmp_path / "rm" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "score" not in name}, path)
    section = ModelSection(name_or_path=str(tmp_path / "rm"))
    with pytest.raises(ModelError, match="no `score` weights"):
        load_reward_model(section, load_tokenizer(section))


def test_scores_without_segment_attention_are_refused(tiny_model_folder: Path) -> None:
    recipe = make_recipe("reward", tiny_model_folder)
    reward = new_reward_model(recipe, load_tokenizer(recipe.model))
    with pytest.raises(ModelError, match="segment attention"):
        scores_at(reward.model, collate_pairs(PAIRS))


def test_reward_adapter_hangs_on_the_policys_backbone(sft_adapter: Path, tmp_path: Path) -> None:
    """PPO's arrangement: one causal LM, the reward adapter beside the policy's, its head apart, the same scores."""
    _, scores = train_reward_model(sft_adapter, tmp_path / "rm")
    section = ModelSection(name_or_path=str(sft_adapter))
    policy = load_inference(section, load_tokenizer(section))
    attach_adapter(policy, tmp_path / "rm", "reward", trainable=False, heads=False)
    weight = load_file(tmp_path / "rm" / "adapter_model.safetensors")["base_model.model.score.weight"]
    with torch.no_grad(), adapter_in_use(policy, "reward") as model:
        backbone = model.get_base_model().model
        ends = [backbone(torch.tensor([ids])).last_hidden_state[0, -1] for ids in SEQUENCES]
    assert torch.allclose(torch.stack(ends) @ weight[0], scores, atol=1e-5)


def test_full_reward_model_goes_on_from_its_own_head(tiny_model_folder: Path, tmp_path: Path) -> None:
    train_reward_model(tiny_model_folder, tmp_path / "rm")
    recipe = make_recipe("reward", tmp_path / "rm")
    again = new_reward_model(recipe, load_tokenizer(recipe.model))
    assert torch.equal(
        active_head(again.model).weight, load_file(tmp_path / "rm" / "model.safetensors")["score.weight"]
    )


def test_reward_model_on_another_base_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    train_reward_model(base, tmp_path / "rm", lora=LORA)
    another_llama(base, seed=1).save_pretrained(base)
    section = ModelSection(name_or_path=str(tmp_path / "rm"))
    with pytest.raises(ModelError, match="trained on a base with sha256"):
        load_reward_model(section, load_tokenizer(section))
