"""Tokenizers: a pad token that ends no reply, the chat template that was trained with, the ids that end a reply.

Nothing is ever added to a vocabulary: new tokens would need new embedding rows, trained and saved with every adapter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from chatalign.artifact import ARTIFACT_FILE, Artifact, fingerprint, sha256_file
from chatalign.errors import ModelError, TemplateError
from chatalign.models.resolve import resolve
from chatalign.recipe import ModelSection

# Built-in templates for base models that have none. `zephyr` (alignment-handbook, zephyr-7b) needs no token but EOS;
# `chatml` needs <|im_start|> and <|im_end|> to be tokens of the model already, as in Qwen's bases.
_ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"zephyr": _ZEPHYR, "chatml": _CHATML}

# Tokens that models bring along and never use in text, best first (Llama 3, Qwen, Pythia/OLMo, Phi-3, Mistral …).
_SPARE = (r"pad", r"reserved", r"unused", r"placeholder", r"^<unk>$")


def load_tokenizer(section: ModelSection, *, chat: bool = False) -> Any:
    """The tokenizer of a model section, with the recipe's chat template and a pad token that ends no reply.

    With `chat` a template is demanded. Raises ModelError (no tokenizer, no spare pad token) or TemplateError (no
    template, or in a finished run's folder another one than the run was trained with).
    """
    source, revision, artifact = _source(section)
    tokenizer = _from_pretrained(source, revision)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{source}: its tokenizer has no EOS token, so that no reply could end; set `eos_token` in it")
    if section.chat_template_path:
        tokenizer.chat_template = _template(section.chat_template_path, tokenizer)
        tokenizer.eos_token = _turn_end(tokenizer) or tokenizer.eos_token
    elif artifact is not None:
        _refuse_another_text(tokenizer, source, artifact)
    _choose_pad(tokenizer, source)
    if chat and not tokenizer.chat_template:
        raise TemplateError(
            f"{source}: its tokenizer has no chat template (a base model); set `model.chat_template_path` to a "
            f"Jinja file, `zephyr` or `chatml`, or `data.apply_chat_template: false`"
        )
    return tokenizer


def text_hashes(tokenizer: Any, folder: str | Path) -> dict[str, str | None]:
    """What an artifact records of the text that its model reads: the hashes of ``tokenizer.json`` and the template.

    `folder` holds the saved tokenizer. Raises TemplateError where its template isn't `tokenizer`'s: served, it would
    be another than the one that was trained with.
    """
    file = Path(folder) / "tokenizer.json"
    template_sha256 = _template_sha256(tokenizer)
    if _template_sha256(_from_pretrained(str(folder), "main")) != template_sha256:
        raise TemplateError(
            f"{folder}: the chat template saved here is not the one that was trained with; "
            f"see that nothing else writes into this folder, and run the stage again"
        )
    return {
        "tokenizer_sha256": sha256_file(file) if file.is_file() else None,
        "chat_template_sha256": template_sha256,
    }


def _template_sha256(tokenizer: Any) -> str | None:
    """The hash of the chat template, or of several named ones; None without any."""
    template = tokenizer.chat_template
    if not template:
        return None
    if isinstance(template, dict):
        return fingerprint({name: _one_line_end(text) for name, text in template.items()})
    return fingerprint(_one_line_end(template))


def _one_line_end(text: str) -> str:
    # Jinja reads all line ends as one, and saving a template writes them as one.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _source(section: ModelSection) -> tuple[str, str, Artifact | None]:
    """Where the tokenizer lies, its revision, and the record of the run that it belongs to."""
    if section.tokenizer_name_or_path:
        return section.tokenizer_name_or_path, "main", None
    if not section.name_or_path:
        raise ModelError("`model.name_or_path` is missing; give a Hub id, a model folder or a run folder")
    resolved = resolve(section.name_or_path, revision=section.revision)
    own = resolved.adapter is not None and not (resolved.adapter / "tokenizer_config.json").is_file()
    return (resolved.base if own else resolved.source), resolved.revision, resolved.artifact


def _refuse_another_text(tokenizer: Any, source: str, artifact: Artifact) -> None:
    """Raise where a run's tokenizer or template is not what its artifact records: it would be served another text."""
    file = Path(source) / "tokenizer.json"
    if artifact.chat_template_sha256 not in (None, _template_sha256(tokenizer)):
        raise TemplateError(
            f"{source}: its chat template is not the one that run {artifact.run_id} was trained with "
            f"({ARTIFACT_FILE} records sha256 {artifact.chat_template_sha256[:12]}…); restore it, "
            f"or give the one that is meant by `model.chat_template_path`"
        )
    if artifact.tokenizer_sha256 is not None and file.is_file() and sha256_file(file) != artifact.tokenizer_sha256:
        raise ModelError(
            f"{file}: altered since run {artifact.run_id} was trained with it ({ARTIFACT_FILE} records sha256 "
            f"{artifact.tokenizer_sha256[:12]}…); restore it, or give `model.tokenizer_name_or_path`"
        )


def _from_pretrained(source: str, revision: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{source}: no tokenizer can be loaded ({reason}); give `model.tokenizer_name_or_path`"
        ) from None


def _choose_pad(tokenizer: Any, source: str) -> None:
    """Where pad is missing or ends replies, take a token that text never holds: with pad = EOS, EOS isn't learned."""
    ends = {tokenizer.eos_token, _turn_end(tokenizer)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token not in ends:
        return
    names = [added.content for added in tokenizer.added_tokens_decoder.values()]
    if tokenizer.unk_token:
        names.append(tokenizer.unk_token)
    taken = {*ends, tokenizer.bos_token}
    for pattern in _SPARE:
        for name in names:
            if name not in taken and re.search(pattern, name, re.IGNORECASE):
                tokenizer.pad_token = name
                return
    raise ModelError(
        f"{source}: its pad token is missing or ends replies, and no spare token is found to pad with; "
        f"set `pad_token` in its tokenizer_config.json to a token that the model has and text never holds"
    )


def _template(name_or_path: str, tokenizer: Any) -> str:
    if name_or_path in TEMPLATES:
        if name_or_path == "chatml":
            missing = [token for token in ("<|im_start|>", "<|im_end|>") if _single_id(tokenizer, token) is None]
            if missing:
                raise TemplateError(
                    f"`model.chat_template_path: chatml` needs {' and '.join(missing)}, which this tokenizer lacks "
                    f"(chatalign adds no tokens); use `zephyr`, which needs none"
                )
        return TEMPLATES[name_or_path]
    try:
        return Path(name_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise TemplateError(
            f"`model.chat_template_path: {name_or_path}` is no readable file and no built-in template; "
            f"give a Jinja file or one of {', '.join(TEMPLATES)}"
        ) from None


def _single_id(tokenizer: Any, token: str) -> int | None:
    index = tokenizer.get_vocab().get(token)
    return int(index) if index is not None else None


def _turn_end(tokenizer: Any) -> str | None:
    """The special token that the template puts after an assistant's reply, or None where it puts plain text."""
    if not tokenizer.chat_template:
        return None
    reply = "chatalign reply"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template can't render a question and its answer ({error}); mend it") from None
    if reply not in text:
        return None
    tail = tokenizer(text.rpartition(reply)[2], add_special_tokens=False)["input_ids"]
    special = {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    first = next((i for i in tail if tokenizer.decode([i]).strip()), None)
    return str(tokenizer.convert_ids_to_tokens(first)) if first in special else None


def stop_token_ids(tokenizer: Any, generation_config: Any | None = None) -> list[int]:
    """The ids that end a reply, ascending: EOS, the template's end of turn, and the generation config's; never pad."""
    stops = {tokenizer.eos_token_id}
    if (turn_end := _turn_end(tokenizer)) is not None:
        stops.add(tokenizer.convert_tokens_to_ids(turn_end))
    configured: int | Sequence[int] | None = getattr(generation_config, "eos_token_id", None)
    if configured is not None:
        stops.update([configured] if isinstance(configured, int) else configured)
    stops.discard(tokenizer.pad_token_id)
    return sorted(int(stop) for stop in stops if stop is not None)
