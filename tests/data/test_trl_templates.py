"""The templates of real model families that TRL carries: our targets are exact on them, and as their markers say."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chat_families import make

from chatalign.data.chat import ChatEncoder, Encoded
from chatalign.data.rows import BadRow, Conversation

# Template → (the model's EOS token, BOS token, how many encodings a conversation of two replies becomes).
REAL = {
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", 1),
    "llama3_1": ("<|eot_id|>", "<|begin_of_text|>", 1),
    "qwen2_5": ("<|im_end|>", None, 1),
    "qwen3": ("<|im_end|>", None, 2),  # thoughts on the last reply only
    "qwen3_instruct_2507": ("<|im_end|>", None, 1),
    "gemma": ("<end_of_turn>", "<bos>", 1),
    "gemma3": ("<end_of_turn>", "<bos>", 1),
    "phi3": ("<|endoftext|>", None, 1),
    "gptoss": ("<|return|>", None, 2),  # the last reply ends in <|return|>, others in <|end|>
    "glm4moe": ("<|endoftext|>", None, 1),
    "cohere2": ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", 1),
    "lfm2": ("<|im_end|>", None, 1),
}
SPECIAL = re.compile(r"<[|｜][^<>|｜ {}]+[|｜]>|<(?:start|end)_of_turn>")
MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "thank you!"},
    {"role": "user", "content": "what is 1 + 2?"},
    {"role": "assistant", "content": "it is 3"},
]


def template_file(name: str) -> Path:
    spec = find_spec("trl")  # finds the folder without importing it
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    path = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this trl has no {name}.jinja")
    return path


def tokenizer_for(name: str, template: str) -> Any:
    eos, bos, _ = REAL[name]
    special = tuple(token for token in dict.fromkeys(SPECIAL.findall(template)) if token not in (eos, bos))
    return make(template, eos, bos, special)


def encode(tokenizer: Any) -> list[Encoded]:
    (made,) = ChatEncoder(tokenizer).conversations([Conversation(messages=MESSAGES)], "assistant")
    assert not isinstance(made, BadRow), str(made)
    return made


@pytest.mark.parametrize("name", REAL)
def test_targets_on_real_templates(name: str) -> None:
    template = template_file(name).read_text("utf-8")
    tokenizer = tokenizer_for(name, template)
    made = encode(tokenizer)
    assert len(made) == REAL[name][2]
    texts = [tokenizer.decode(one.ids[first:last]) for one in made for first, last in one.spans]
    for text, reply in zip(texts, ("thank you!", "it is 3"), strict=True):
        before, ending = text.split(reply)
        assert "".join(SPECIAL.findall(ending)) == ending.strip() != ""
        assert "hello" not in before


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma", "gemma3", "phi3", "glm4moe", "cohere2"])
def test_targets_agree_with_trls_markers(name: str) -> None:
    """Where TRL's training variant marks replies, ours are the same but for white space at their ends."""
    template = template_file(f"{name}_training").read_text("utf-8")
    tokenizer = tokenizer_for(name, template)
    theirs = tokenizer.apply_chat_template(MESSAGES[:2], return_assistant_tokens_mask=True, return_dict=True)
    marked = [id_ for id_, mark in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if mark]
    encoder = ChatEncoder(tokenizer)
    ours = encoder.conversation(Conversation(messages=MESSAGES[:2]), "assistant")
    (first, last), *_ = ours.spans
    text, their_text = tokenizer.decode(ours.ids[first:last]), tokenizer.decode(marked)
    if name in ("phi3", "glm4moe"):  # an EOS after the stop token; the next role's token instead of EOS
        assert their_text.strip().startswith(text.strip().removesuffix("<|endoftext|>"))
    else:
        assert text.strip() == their_text.strip()
