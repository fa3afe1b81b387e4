"""Who plays on which weights: shared adapters score as the models that they come from, and stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_llama, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from chatalign import ppo
from chatalign.engine.ppo_model import allow_all_tokens, forbid_tokens
from chatalign.engine.ppo_rewards import ModelScorer
from chatalign.models.heads import load_reward_model
from chatalign.models.tokenizer import load_tokenizer
from chatalign.recipe import ModelSection

from .conftest import LORA, Make, built, train_reward
from .test_run import logged, weights


def one_by_one(folder: Path, sequences: list[list[int]]) -> list[float]:
    """What the finished reward model itself gives each sequence, alone."""
    section = ModelSection(name_or_path=str(folder))
    model = load_reward_model(section, load_tokenizer(section)).model
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0]) for ids in sequences]


def spied(trainer: Any) -> list[Any]:
    kept: list[Any] = []
    collect = trainer.play.collector.collect
    trainer.play.collector.collect = lambda *args, **named: kept.append(collect(*args, **named)) or kept[-1]
    return kept


def test_four_roles_on_one_backbone(make_recipe: Make, sft_run: Path, reward_adapter_run: Path) -> None:
    over = {
        "model": {"name_or_path": str(sft_run)},
        "reward_model": {"name_or_path": str(reward_adapter_run)},
        "ppo": {"rewards": [], "num_mini_batches": 1, "num_ppo_epochs": 1, "missing_eos_penalty": None},
    }
    trainer = built(make_recipe("run", over))
    assert set(trainer.model.policy.peft_config) == {"default", "reference", "value", "reward_model"}
    scorer = trainer.play.collector.rewards.terms[0].scorer
    assert isinstance(scorer, ModelScorer)
    assert scorer.model is trainer.model.policy
    reference = trainer.play.collector.reference
    before = reference.sha256()
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trained = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    kept = spied(trainer)
    trainer.train()

    episodes = kept[0].episodes
    sequences = [[*p, *r] for p, r in zip(episodes.prompt_ids, episodes.response_ids, strict=True)]
    raw = one_by_one(reward_adapter_run, sequences)
    assert episodes.score_terms["model"].tolist() == pytest.approx(raw, abs=1e-5)
    normaliser = trainer.play.collector.rewards.terms[0].normaliser
    assert normaliser is not None
    normal = [(score - normaliser.mean) / normaliser.std for score in raw]
    assert episodes.scores.tolist() == pytest.approx(normal, abs=1e-4)
    # The value function starts as the reward model, in the policy's units: after the last token it is the score.
    assert episodes.bootstrap.tolist() == pytest.approx(normal, abs=1e-4)

    assert reference.sha256() == before
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    changed = {name for name, tensor in trained.items() if not torch.equal(now[name], tensor)}
    assert changed == set(trained), "every trainable weight moved"
    assert {name.split(".")[-2] for name in trained if "lora_" in name} == {"default", "value"}


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_reference_stays(make_recipe: Make, lora: dict[str, Any] | None) -> None:
    trainer = built(make_recipe("run", {"lora": lora}))
    before = trainer.play.collector.reference.sha256()
    trainer.train()
    assert trainer.play.collector.reference.sha256() == before


def test_full_policy_and_full_reward_model(make_recipe: Make, reward_full_run: Path) -> None:
    reward = {"reward_model": {"name_or_path": str(reward_full_run)}, "ppo": {"rewards": [], "num_mini_batches": 1}}
    trainer = built(make_recipe("run", reward))
    kept = spied(trainer)
    trainer.train()
    episodes = kept[0].episodes
    sequences = [[*p, *r] for p, r in zip(episodes.prompt_ids, episodes.response_ids, strict=True)]
    assert episodes.score_terms["model"].tolist() == pytest.approx(one_by_one(reward_full_run, sequences), abs=1e-5)
    assert episodes.bootstrap.tolist() == pytest.approx(episodes.scores.tolist(), abs=1e-4)


def test_a_reward_model_with_another_tokenizer_reads_text(make_recipe: Make, tmp_path: Path) -> None:
    other = make_tokenizer(vocab_size=300)
    other.chat_template = other.chat_template.replace("<|im_start|>", "<|end|>")
    make_llama(len(other), seed=3).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "reward").mkdir()
    folder = train_reward(tmp_path / "reward", tmp_path / "other")
    over = {"reward_model": {"name_or_path": str(folder)}, "ppo": {"rewards": []}}
    trainer = built(make_recipe("run", over))
    kept = spied(trainer)
    trainer.train()
    episodes = kept[0].episodes
    policy_tokenizer = trainer.processing_class
    sequences = []
    for prompt, reply in zip(episodes.prompt_ids, episodes.response_ids, strict=True):
        text = policy_tokenizer.decode(prompt).replace("<|im_start|>", "<|end|>")
        text += policy_tokenizer.decode(reply, skip_special_tokens=True) + "<|im_end|>"
        sequences.append(other(text, add_special_tokens=False)["input_ids"])
    assert episodes.score_terms["model"].tolist() == pytest.approx(one_by_one(folder, sequences), abs=1e-5)


def test_dropout_never_reaches_a_logprob(make_recipe: Make, tmp_path: Path, tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": len(tiny_tokenizer), "n_positions": 128}
    noisy = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    GPT2LMHeadModel(GPT2Config(**shape, **noisy)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    once = {"num_mini_batches": 1, "num_ppo_epochs": 1}
    recipe = make_recipe("run", {"model": {"name_or_path": str(tmp_path / "gpt2")}, "ppo": once})
    ppo.run(recipe)
    for line in logged(recipe):
        assert line["sampler/logprob_gap"] < 1e-5
        assert line["policy/ratio_var"] < 1e-8
    assert logged(recipe)[0]["objective/kl_k3"] == pytest.approx(0, abs=1e-6)


def test_gradient_checkpointing_changes_nothing_where_adapters_take_turns(make_recipe: Make) -> None:
    # Recomputed under the wrong adapter, the value adapter's gradients would be the policy's.
    plain = make_recipe("plain", {"lora": LORA})
    saved = make_recipe("saved", {"lora": LORA, "train": {"gradient_checkpointing": True}})
    for recipe in (plain, saved):
        ppo.run(recipe)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(saved)[name], tensor, rtol=0, atol=1e-6)
    for mine, yours in zip(logged(plain), logged(saved), strict=True):
        assert yours["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)


def test_adapters_take_turns(make_recipe: Make) -> None:
    """The cheap switch is peft's own, with modules saved whole too, and leaves gradient flags alone."""
    from chatalign.models.reference import adapter_in_use

    trainer = built(make_recipe("run", {"lora": LORA | {"modules_to_save": ["embed_tokens"]}}))
    trainer.train()
    model = trainer.model
    policy = model.policy.eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
    flags = [parameter.requires_grad for parameter in policy.parameters()]
    before = policy(**inputs).logits
    with adapter_in_use(policy, "value"):
        theirs = policy(**inputs).logits
    with model._adapters.use("value"):
        assert torch.equal(policy(**inputs).logits, theirs)
        assert not torch.equal(theirs, before)
        assert [parameter.requires_grad for parameter in policy.parameters()] == flags
    assert torch.equal(policy(**inputs).logits, before)


def test_forbidden_tokens_leave_no_trace(make_recipe: Make) -> None:
    model = built(make_recipe("run")).model.policy
    allow_all_tokens(model)
    ids = torch.tensor([[5, 6, 7]])
    names, before = model.state_dict().keys(), model(input_ids=ids).logits
    assert forbid_tokens(model, [1, 2])
    assert model(input_ids=ids).logits.softmax(-1)[..., [1, 2]].max() == 0
    assert model.state_dict().keys() == names
    allow_all_tokens(model)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.slow
def test_qlora(make_recipe: Make, sft_run: Path, reward_adapter_run: Path) -> None:
    pytest.importorskip("bitsandbytes")
    over = {
        "model": {"name_or_path": str(sft_run)},
        "reward_model": {"name_or_path": str(reward_adapter_run)},
        "quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
        "ppo": {"rewards": [], "num_mini_batches": 1, "num_ppo_epochs": 1},
    }
    recipe = make_recipe("run", over)
    artifact = ppo.run(recipe)
    assert artifact.kind == "adapter"
    first, second = logged(recipe)
    assert first["policy/ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert first["objective/kl_k3"] == pytest.approx(0, abs=1e-5)
    assert second["objective/kl_k3"] > 1e-5
