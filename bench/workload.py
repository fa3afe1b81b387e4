"""What every training arm works on: three random-init Llamas, their tokenizers, and rows of real lengths.

``make(folder)`` writes all of it once. Rows come from ``../shared/data`` (alpaca_en, dpo_en) where that folder lies
beside the project, else they are made with the same spread of lengths; the result says which. Every row fits 512
tokens, so that no arm truncates, and all arms count the same tokens.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CACHE = ROOT / "bench" / ".cache"
MAX_LENGTH = 512
SFT_ROWS, PAIRS, PROBE_ROWS = 256, 64, 12
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
# No newline after a stop token: a reply ends there for every arm, whatever it supervises after it.
CHATML = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """A Llama by its width; `tied` shares embedding and head."""

    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    tied: bool = False


SIZES = {
    "3.4M": Size(vocabulary=4096, hidden=256, layers=3, intermediate=688, tied=True),
    "7M": Size(vocabulary=8192, hidden=256, layers=4, intermediate=688),
    "25M": Size(vocabulary=8192, hidden=512, layers=6, intermediate=1536, tied=True),
}


def wide_vectors() -> list[str]:
    """What decides a CPU's speed here, by Linux's names; empty where there are none, or no telling."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def model_folder(size: str, work: str = "sft") -> Path:
    """Where a model of :data:`SIZES` lies, tokenizer and all; for reward work, the one that has a head for scores."""
    return CACHE / (f"llama-{size}-score" if work.startswith("reward") else f"llama-{size}")


def rows_file(work: str) -> Path:
    """The rows of ``sft``, ``dpo-short`` (pairs, prompts of about 70 tokens) or ``dpo-long`` (about 240)."""
    return CACHE / f"{work.replace('reward', 'dpo').replace('-lora', '')}.jsonl"


def probe_file(work: str) -> Path:
    """Further rows like :func:`rows_file`'s, on which all arms must find one loss and one gradient norm."""
    return rows_file(work).with_suffix(".probe.jsonl")


def make() -> str:
    """Write models, tokenizers and rows into :data:`CACHE`, where they aren't there yet; returns the rows' source."""
    done = CACHE / "done.json"
    if not done.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        conversations, pairs, source = _texts()
        texts = [text for parts in [*conversations, *pairs] for text in parts]
        tokenizers = {size: _tokenizer(texts, SIZES[size].vocabulary) for size in SIZES}
        for size, tokenizer in tokenizers.items():
            _save_model(SIZES[size], tokenizer, size)
        _write_sft(conversations, tokenizers["3.4M"])
        _write_pairs(pairs, tokenizers["3.4M"])
        done.write_text(json.dumps({"rows": source}))
    return str(json.loads(done.read_text())["rows"])


def _texts() -> tuple[list[list[str]], list[list[str]], str]:
    """(prompt, reply) and (prompt, chosen, rejected) texts, and where they are from."""
    if not (SHARED / "alpaca_en_demo.json").is_file():
        return *_made_texts(), "made with the lengths of alpaca_en_demo and dpo_en_demo"
    alpaca = json.loads((SHARED / "alpaca_en_demo.json").read_text())
    conversations = [[f"{row['instruction']}\n{row['input']}".strip(), row["output"]] for row in alpaca]
    preferences = json.loads((SHARED / "dpo_en_demo.json").read_text())
    pairs = [
        ["\n".join(turn["value"] for turn in row["conversations"]), row["chosen"]["value"], row["rejected"]["value"]]
        for row in preferences
    ]
    return conversations, pairs, "alpaca_en_demo and dpo_en_demo"


def _made_texts() -> tuple[list[list[str]], list[list[str]]]:
    """Zipf-distributed made words, with lengths lognormal about the means of the real rows."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(6000)]
    weights = [1 / (rank + 2) for rank in range(len(words))]

    def text(median: float, spread: float) -> str:
        count = max(3, min(900, int(draw.lognormvariate(0, spread) * median)))
        return " ".join(draw.choices(words, weights, k=count))

    conversations = [[text(14, 0.6), text(70, 0.9)] for _ in range(1000)]
    pairs = [[text(70, 1.0), text(120, 0.8), text(120, 0.8)] for _ in range(600)]
    return conversations, pairs


def _tokenizer(texts: list[str], vocabulary: int):  # transformers is imported where it is needed
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def _save_model(size: Size, tokenizer, name: str) -> None:
    """A language model, and the same with a random head for scores, so that reward arms start alike."""
    from copy import deepcopy

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    scored = deepcopy(config)  # the language model's own must not say that it has labels
    scored.num_labels = 1
    scorer = LlamaForSequenceClassification(scored)
    scorer.model.load_state_dict(model.model.state_dict())
    for one, folder in ((model, model_folder(name)), (scorer, model_folder(name, "reward"))):
        one.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _write_sft(conversations: list[list[str]], tokenizer) -> None:
    rows = []
    for prompt, reply in conversations:
        ids = tokenizer.apply_chat_template(_chat(prompt) + _reply(reply), return_dict=True)["input_ids"]
        if reply and len(ids) <= MAX_LENGTH:
            rows.append({"prompt": _chat(prompt), "completion": _reply(reply)})
    _write("sft", rows, SFT_ROWS)


def _write_pairs(pairs: list[list[str]], tokenizer) -> None:
    """Pairs whose prompts come to about 70 and 240 tokens, with the replies' own lengths, uncut.

    A pair that would not fit is left out, as RewardTrainer does with it, and the next reply takes its prompt's length.
    """
    lengths = [len(tokenizer(max(pair[1:], key=len))["input_ids"]) for pair in pairs]
    for work, wanted in (("dpo-short", 86), ("dpo-long", 285)):
        rows: list[dict] = []
        for i, (prompt, *replies) in enumerate(pairs * 12):
            length = int(wanted * (0.5, 0.8, 1.0, 1.2, 1.4)[len(rows) % 5])
            room = MAX_LENGTH - length - 24  # the template's tokens, and what encoding a cut text again adds
            if max(map(len, replies)) and replies[0] != replies[1] and lengths[i % len(pairs)] <= room:
                text = " ".join([prompt, *(pairs[(i + k) % len(pairs)][0] for k in range(1, 40))])
                cut = tokenizer.decode(tokenizer(text)["input_ids"][i % 7 : i % 7 + length])
                rows.append({"prompt": _chat(cut), "chosen": _reply(replies[0]), "rejected": _reply(replies[1])})
                if len(rows) == PAIRS + PROBE_ROWS:
                    break
        _write(work, rows, PAIRS)


def _write(work: str, rows: list[dict], count: int) -> None:
    parts = ((rows_file(work), rows[:count]), (probe_file(work), rows[count : count + PROBE_ROWS]))
    for file, part in parts:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))


if __name__ == "__main__":
    print(make())
