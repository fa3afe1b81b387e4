"""Six families of chat templates, and some with a trap, each with a tokenizer made in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_TEXT = [
    "hello world, what is the capital of France?",
    "the answer is Paris. thank you!",
    "你好，世界",
    "1 + 2 = 3\n\n",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Like Qwen3: only the last reply gets a (here empty) block of thoughts.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like DeepSeek-R1: the generation prompt opens thoughts that the rendered reply lacks.
OPENED = THINKING.replace("and loop.last", "and false").replace(
    "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
)
# Like GLM-4: a turn ends where the next role's token begins.
NEXT_ROLE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_STOP = PLAIN.replace(" + eos_token", "")
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '<call>' + call.function.name + call.function.arguments | tojson + '</call>' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{# role 'tool' is taken #}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and the kind of tokenizer that its models have."""

    name: str
    template: str
    stop: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    metaspace: str | None = None  # SentencePiece's dummy prefix: "first" or "always"; None: byte-level
    lead: str = ""  # what the template puts between generation prompt and reply
    split: str | None = None  # the regular expression that cuts words; None: GPT-2's
    takes_system: bool = True


FAMILIES = [
    Family("chatml", CHATML, "<|im_end|>", special=("<|im_start|>",)),
    Family("chatml_plain", CHATML_PLAIN, "<|im_end|>", special=("<|im_start|>",)),
    Family(
        "llama3",
        LLAMA3,
        "<|eot_id|>",
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        split=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    Family("mistral", MISTRAL, "</s>", "<s>", metaspace="first", lead=" ", takes_system=False),
    Family("mistral_legacy", MISTRAL, "</s>", "<s>", metaspace="always", lead=" ", takes_system=False),
    Family("gemma", GEMMA, "<end_of_turn>", "<bos>", ("<start_of_turn>",), takes_system=False),
    Family("zephyr", ZEPHYR, "</s>", "<s>", metaspace="first"),
    Family("plain", PLAIN, "<|end|>", lead=" "),
]
BY_NAME = {family.name: family for family in FAMILIES}


def tokenizer_of(family: Family) -> Any:
    """The family's tokenizer, kept."""
    return make(family.template, family.stop, family.bos, family.special, family.metaspace, family.split)


@lru_cache
def make(
    template: str,
    eos: str,
    bos: str | None = None,
    special: tuple[str, ...] = (),
    metaspace: str | None = None,
    split: str | None = None,
) -> Any:
    """A BPE tokenizer with these special tokens; byte-level, or with SentencePiece's spaces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", *([bos] if bos else []), eos, *special]
    if metaspace is None:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
        if split is not None:
            words = pre_tokenizers.Split(Regex(split), "isolated")
            raw.pre_tokenizer = pre_tokenizers.Sequence([words, raw.pre_tokenizer])
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokens = ["<unk>", *tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = ["▁", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=len(tokens) + 380, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_TEXT * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_plain_bytes(raw) if metaspace else raw, pad_token="<pad>", eos_token=eos, bos_token=bos
    )
    tokenizer.chat_template = template
    return tokenizer


def _plain_bytes(raw: Any) -> Any:
    """The byte-fallback tokens as ordinary vocabulary: text that looks like one must not become one."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(raw.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))
