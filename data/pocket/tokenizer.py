"""The pocket tokenizer: BPE over characters, bytes for what it has never seen, ChatML-like special tokens.

Characters, because byte-level merges at this size cut Chinese words in the middle of a character.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1280
DOCUMENT_END, PAD, START, END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [DOCUMENT_END, PAD, START, END]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"
# Words and digits take the space before them; everything else stands alone. The commonest Chinese particles
# (of, is, in) stand alone too, or merges would glue them to the end of the word before.
PARTICLES = "的是里"
PIECES = f"{SPACE}?[A-Za-z']+|{SPACE}?[0-9]|(?:(?![{PARTICLES}])[\u4e00-\u9fff])+|[\\s\\S]"

# `{% generation %}` marks what the assistant says, its stop token included and nothing after it.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the texts; the same texts give the same tokenizer."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", SPACE)
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    bpe.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # Byte tokens are no special tokens: they must survive decoding with skip_special_tokens.
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(BYTES), special_tokens=SPECIALS, show_progress=False)
    bpe.train_from_iterator(texts, trainer=trainer)
    bpe = _with_bytes(bpe)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=DOCUMENT_END,  # ends documents; a turn ends with END, which the template says
        pad_token=PAD,
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _with_bytes(bpe: Tokenizer) -> Tokenizer:
    """The same tokenizer with the byte tokens after the learnt vocabulary."""
    content = json.loads(bpe.to_str())
    vocabulary = content["model"]["vocab"]
    for token in BYTES:
        vocabulary[token] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(content))


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save_pretrained(folder)
