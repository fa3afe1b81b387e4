"""Failures of adapters, merging and saving: planted, and named where a model is loaded, merged or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models.model_cases import LORA, logits, make_recipe, train_a_little, train_adapter
from safetensors.torch import load_file, save_file
from tiny import make_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import chatalign.merge
from chatalign import dpo
from chatalign.engine.dpo_trainer import DpoTrainer
from chatalign.engine.ppo_critic import _critic
from chatalign.merge import merge
from chatalign.models import adapters
from chatalign.models.adapters import load_policy, save_model
from chatalign.models.load import load_tokenizer
from chatalign.models.reference import Reference
from chatalign.recipe import ModelSection
from mutants.guard_table import named

WEIGHTS = "adapter_model.safetensors"
NEW_TOKENS = LORA | {"modules_to_save": ["embed_tokens"]}


def policy_of(stage: str, start: Path, **sections: Any) -> Any:
    recipe = make_recipe(stage, start, **sections)
    return load_policy(recipe, load_tokenizer(recipe.model))


@pytest.fixture(scope="module")
def sft_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """An adapter's folder, as an SFT stage leaves it."""
    return train_adapter(tiny_model_folder, tmp_path_factory.mktemp("sft") / "model")


@pytest.fixture
def adapter(tmp_path: Path, sft_adapter: Path) -> Path:
    """An adapter of one's own to spoil."""
    return Path(shutil.copytree(sft_adapter, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of preferences."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{word} world", "chosen": "thank you!", "rejected": "hello"} for word in ("1 +", "the", "of")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def dpo_run(folder: Path, pairs: str, start: Path) -> None:
    train = {"max_steps": 1, "save_strategy": "no", "use_cpu": True}
    sections = {"data": {"datasets": [{"path": pairs}]}, "train": train}
    dpo.run(make_recipe("dpo", start, output_dir=str(folder), **sections))


# 27: what trains is saved


def test_an_embedding_thawed_beside_the_adapter(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_adapter = adapters.new_adapter

    def with_new_tokens(*args: Any, **kwargs: Any) -> Any:
        model = new_adapter(*args, **kwargs)
        model.get_input_embeddings().weight.requires_grad_(True)
        return model

    monkeypatch.setattr(adapters, "new_adapter", with_new_tokens)
    with named(27):
        policy_of("sft", tiny_model_folder, lora=LORA)


def without_whole_modules(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: {name: t for name, t in right(*args, **kwargs).items() if "lora_" in name}


def test_a_library_that_saves_lora_weights_alone(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("sft", tiny_model_folder, lora=NEW_TOKENS)
    monkeypatch.setattr(peft, "get_peft_model_state_dict", without_whole_modules(peft.get_peft_model_state_dict))
    with named(27):
        save_model(policy.model, load_tokenizer(ModelSection(name_or_path=str(tiny_model_folder))), tmp_path / "out")
    with named(27):
        policy_of("sft", tiny_model_folder, lora=NEW_TOKENS)


@pytest.mark.parametrize(
    "lora",
    [
        NEW_TOKENS,
        LORA | {"modules_to_save": ["lm_head", "embed_tokens"]},
        LORA | {"target_modules": ["embed_tokens", "q_proj"]},
        LORA | {"use_dora": True},
        LORA | {"bias": "lora_only"},
    ],
)
def test_whatever_an_adapter_may_hold_comes_back(tiny_model_folder: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = train_adapter(tiny_model_folder, tmp_path / "adapter", lora=lora)
    policy = policy_of("sft", folder)
    before = logits(policy.model)
    train_a_little(policy.model)
    assert not torch.equal(logits(policy.model), before)
    save_model(policy.model, load_tokenizer(ModelSection(name_or_path=str(folder))), tmp_path / "again")
    assert torch.equal(logits(policy_of("sft", tmp_path / "again").model), logits(policy.model))


# 28 and 29: merging


def test_a_merge_into_tied_embeddings(
    tiny_model_folder: Path, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_llama(len(tiny_tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    folder = train_adapter(tmp_path / "base", tmp_path / "adapter", lora=LORA | {"target_modules": ["lm_head"]})
    monkeypatch.setattr(chatalign.merge, "_untie_where_adapted", lambda model: None)  # what peft alone would do
    with named(28):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def on_4_bit_weights(adapter: Path, base: Path, folder: Path) -> Path:
    """The adapter beside a base whose own weights are stored in 4 bits, which is now its base."""
    config = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(folder)
    for name in ("adapter_config.json", "base_model.json"):
        settings = json.loads((adapter / name).read_text("utf-8"))
        settings |= {"base_model_name_or_path": str(folder)} if "config" in name else {"name_or_path": str(folder)}
        settings.pop("sha256", None)
        (adapter / name).write_text(json.dumps(settings), "utf-8")
    return adapter


def test_a_merge_into_4_bit_weights(adapter: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    on_4_bit_weights(adapter, tiny_model_folder, tmp_path / "base")
    with named(29):
        merge(adapter, tmp_path / "merged")
    section = ModelSection(name_or_path=str(adapter))
    tokenizer = load_tokenizer(section)
    recipe = make_recipe("ppo", adapter, ppo={"rewards": [{"function": "a.py:b"}]})
    with named(29):  # PPO folds the adapter of a `value_model` into its base, too
        _critic(recipe, section, tokenizer, [])


# 30 and 31: loading


def test_keys_of_another_library_version(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    renamed = {name.replace("base_model.model.", "base_model.model.model."): t for name, t in tensors.items()}
    save_file(renamed, adapter / WEIGHTS)
    with named(30):
        policy_of("dpo", adapter)


def test_a_library_that_reads_nothing(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "set_peft_model_state_dict", lambda *_, **__: None)
    with named(30):
        policy_of("dpo", adapter)


def test_an_adapter_that_does_nothing(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: t * ("lora_A" in name) for name, t in tensors.items()}, adapter / WEIGHTS)
    with named(30):
        policy_of("dpo", adapter)


def test_an_adapter_on_another_base(tiny_model_folder: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    base = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    folder = train_adapter(base, tmp_path / "adapter")
    make_llama(len(tiny_tokenizer), seed=1).save_pretrained(base)  # the same shapes: peft would take it
    with named(31):
        policy_of("dpo", folder)


def test_an_adapter_twice(adapter: Path, tmp_path: Path) -> None:
    merged = merge(adapter, tmp_path / "merged")
    settings = json.loads((adapter / "base_model.json").read_text("utf-8"))
    (adapter / "base_model.json").write_text(json.dumps(settings | {"name_or_path": str(merged)}), "utf-8")
    with named(31):
        policy_of("dpo", adapter)


# 33: the files hold the model


def shard(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What one of two processes has of a model that is sharded."""
    return {name: tensor[: len(tensor) // 2] for name, tensor in tensors.items()}


@pytest.mark.parametrize("lora", [None, LORA])
def test_one_shard_of_two(tiny_model_folder: Path, tmp_path: Path, lora: dict[str, Any] | None) -> None:
    policy = policy_of("sft", tiny_model_folder, lora=lora)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_model_folder)))
    with named(33):
        save_model(policy.model, tokenizer, tmp_path, state_dict=shard(policy.model.state_dict()))


@pytest.mark.parametrize("fault", ["a file less", "a bit"])
def test_a_save_that_loses_something(tiny_model_folder: Path, tmp_path: Path, fault: str) -> None:
    policy = policy_of("sft", tiny_model_folder)
    save_pretrained = policy.model.save_pretrained

    def losing(folder: Path, **kwargs: Any) -> None:
        save_pretrained(folder, **kwargs, max_shard_size="100KB")
        first, *others = sorted(folder.glob("*.safetensors"))
        assert others
        if fault == "a file less":
            first.unlink()
        else:
            first.write_bytes(first.read_bytes()[:-1] + bytes([first.read_bytes()[-1] ^ 1]))

    policy.model.save_pretrained = losing
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_model_folder)))
    with named(33):
        save_model(policy.model, tokenizer, tmp_path)


# 34 in DPO: PPO's are in test_ppo.py


def test_dpo_against_the_base_and_not_the_sft_adapter(
    sft_adapter: Path, tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_reference", lambda model, *_: Reference(model, way="disabled"))
    with named(34):
        dpo_run(tmp_path / "run", pairs, sft_adapter)


def test_dpo_without_its_reference(
    tiny_model_folder: Path, tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a trainer whose reference is None, and whose log-ratios are then the policy's own log-probabilities.
    monkeypatch.setattr(DpoTrainer, "_reference_logprobs", lambda self, batch: torch.zeros(batch["num_sequences"]))
    with named(34):
        dpo_run(tmp_path / "run", pairs, tiny_model_folder)


def test_a_dpo_loss_that_leaves_the_reference_out(
    sft_adapter: Path, tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of = DpoTrainer.loss_of
    monkeypatch.setattr(DpoTrainer, "loss_of", lambda self, logps, ref, lengths: loss_of(self, logps, 0 * ref, lengths))
    with named(34):
        dpo_run(tmp_path / "run", pairs, sft_adapter)
