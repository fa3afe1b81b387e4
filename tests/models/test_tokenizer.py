"""Tokenizers: pad is never EOS, templates are there or named, and replies know where to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from chatalign.errors import ModelError, TemplateError
from chatalign.models.adapters import load_inference
from chatalign.models.load import fit_tokenizer, load_tokenizer, stop_token_ids
from chatalign.recipe import ModelSection


def save_tokenizer(folder: Path, special: list[str], **settings: Any) -> ModelSection:
    """A byte-level tokenizer with the given special tokens, as a base model's folder has one."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=raw, **settings).save_pretrained(folder)
    return ModelSection(tokenizer_name_or_path=str(folder))


@pytest.mark.parametrize(
    ("special", "settings", "pad"),
    [  # as in Pythia, Llama 3, Qwen's bases, Mistral
        (["<|endoftext|>", "<|padding|>"], {"eos_token": "<|endoftext|>"}, "<|padding|>"),
        (["<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"],
         {"eos_token": "<|end_of_text|>"}, "<|finetune_right_pad_id|>"),
        (["<|endoftext|>", "<|im_end|>", "<|fim_pad|>"],
         {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, "<|fim_pad|>"),
        (["<unk>", "<s>", "</s>"], {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, "<unk>"),
        (["<end>", "<mine>"], {"eos_token": "<end>", "pad_token": "<mine>"}, "<mine>"),
    ],
)  # fmt: skip
def test_pad_is_a_spare_token(special: list[str], settings: dict[str, Any], pad: str, tmp_path: Path) -> None:
    section = save_tokenizer(tmp_path, special, **settings)
    tokenizer = load_tokenizer(section)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 256 + len(special)


def test_without_a_spare_token_pad_is_refused(tmp_path: Path) -> None:
    section = save_tokenizer(tmp_path, ["<|endoftext|>"], eos_token="<|endoftext|>")
    with pytest.raises(ModelError, match="no spare token"):
        load_tokenizer(section)


def test_chat_needs_a_template_or_a_named_one(tmp_path: Path) -> None:
    section = save_tokenizer(tmp_path, ["<|endoftext|>", "<|padding|>"], eos_token="<|endoftext|>")
    with pytest.raises(TemplateError, match="no chat template"):
        load_tokenizer(section, chat=True)
    with pytest.raises(TemplateError, match=r"chatml.*lacks.*zephyr"):
        load_tokenizer(section.model_copy(update={"chat_template_path": "chatml"}), chat=True)
    with pytest.raises(TemplateError, match="no readable file"):
        load_tokenizer(section.model_copy(update={"chat_template_path": str(tmp_path / "none.jinja")}))
    tokenizer = load_tokenizer(section.model_copy(update={"chat_template_path": "zephyr"}), chat=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>\nHi<|endoftext|>\n<|assistant|>\nYes?<|endoftext|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_chatml_ends_turns_with_its_own_token(tmp_path: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"]
    section = save_tokenizer(tmp_path, special, eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(section.model_copy(update={"chat_template_path": "chatml"}), chat=True)
    assert tokenizer.eos_token == "<|im_end|>"
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[0, 3])) == [0, 2]


def test_template_file_and_template_that_cannot_render(tmp_path: Path) -> None:
    section = save_tokenizer(tmp_path / "t", ["<end>", "<pad>"], eos_token="<end>")
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '<end>' }}{% endfor %}")
    tokenizer = load_tokenizer(section.model_copy(update={"chat_template_path": str(file)}), chat=True)
    assert stop_token_ids(tokenizer) == [0]
    file.write_text("{{ raise_exception('no') }}")
    with pytest.raises(TemplateError, match="can't render"):
        load_tokenizer(section.model_copy(update={"chat_template_path": str(file)}))


def test_stop_tokens_take_the_models_and_never_pad(tiny_tokenizer: Any) -> None:
    assert stop_token_ids(tiny_tokenizer) == [3]
    assert stop_token_ids(tiny_tokenizer, GenerationConfig(eos_token_id=[0, 1])) == [1, 3]
    assert stop_token_ids(tiny_tokenizer, GenerationConfig(eos_token_id=1)) == [1, 3]


def test_saved_generation_config_stops_where_training_did(sft_adapter: Path) -> None:
    saved = json.loads((sft_adapter / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [3]
    assert saved["pad_token_id"] == 0
    section = ModelSection(name_or_path=str(sft_adapter))
    tokenizer = load_tokenizer(section, chat=True)
    model = load_inference(section, tokenizer)
    prompt = tokenizer("hello", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_tokenizer_larger_than_the_model_is_refused(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    larger = load_tokenizer(ModelSection(tokenizer_name_or_path=str(tmp_path)))
    larger.add_tokens(["<new>"])
    model = load_inference(ModelSection(name_or_path=str(tiny_model_folder)), tiny_tokenizer)
    with pytest.raises(ModelError, match="doesn't resize"):
        fit_tokenizer(model, larger)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(ModelSection(tokenizer_name_or_path=str(tmp_path)))
