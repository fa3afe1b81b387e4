"""Base models: loaded whole and in the right precision, or made from a configuration.

Precision (failure 20 of the bank): a bfloat16 weight has 8 bits of mantissa, so that AdamW's updates below 1/256 of
it vanish. Trainable weights are therefore float32 always; ``train.bf16`` computes in bfloat16 on top of them, and a
frozen base under an adapter may be stored in bfloat16.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatalign.artifact import BaseModelRef
from chatalign.errors import DependencyError, ModelError
from chatalign.models.resolve import Resolved, base_sha256
from chatalign.models.tokenizer import load_tokenizer, stop_token_ids
from chatalign.recipe import ModelSection, QuantizationSection

__all__ = [
    "base_ref_of",
    "disable_dropout",
    "fit_tokenizer",
    "load_base",
    "load_tokenizer",
    "new_model",
    "stop_token_ids",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(
    section: ModelSection,
    resolved: Resolved,
    *,
    quantization: QuantizationSection | None = None,
    trainable: bool = False,
    scoring: bool = False,
) -> Any:
    """The base model's weights as a causal LM, or with one score per token where `scoring`.

    `trainable` says that these very weights will be trained (no adapter): they are then float32, and a
    half-precision `model.dtype` is refused. Raises ModelError where weights are missing or can't be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()  # a bar for each file of each role; the stage's own bar is enough
    settings: dict[str, Any] = {"dtype": _dtype(section, trainable=trainable), "revision": resolved.revision}
    if quantization is not None:
        settings |= _quantized(quantization, settings["dtype"])
    if scoring:
        settings["num_labels"] = 1
    loader: Any = AutoModelForSequenceClassification if scoring else AutoModelForCausalLM
    try:
        model, found = loader.from_pretrained(
            resolved.base, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **settings
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{resolved.base}: can't be loaded ({reason}); check the name and its files") from None
    missing = {key for key in found["missing_keys"] if not (scoring and key.startswith("score."))}
    if missing or found["mismatched_keys"]:
        names = sorted(missing) or sorted(str(key) for key in found["mismatched_keys"])
        raise ModelError(
            f"{resolved.base}: {len(names)} weights are missing or misshapen, such as {names[0]}; "
            f"they would be random; fetch the model again"
        )
    # On a CPU bitsandbytes repacks 4-bit weights in place at the first eval pass: train and eval would then differ.
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model


def _dtype(section: ModelSection, *, trainable: bool) -> torch.dtype | str:
    if trainable:
        if section.dtype not in ("auto", "float32"):
            raise ModelError(
                f"`model.dtype: {section.dtype}` with all weights trained loses small updates to rounding; "
                f"set `model.dtype: float32` with `train.bf16: true`, or add a `lora` section"
            )
        return torch.float32
    if section.dtype != "auto":
        return _DTYPES[section.dtype]
    # On a GPU a frozen base stays as it was published; CPUs compute half precision slowly or not at all.
    return "auto" if torch.cuda.is_available() else torch.float32


def _quantized(section: QuantizationSection, dtype: torch.dtype | str) -> dict[str, Any]:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise DependencyError("`quantization` needs bitsandbytes; pip install 'chatalign[quantization]'")
    settings = section.model_dump(exclude={"bnb_4bit_compute_dtype"} if section.load_in_4bit else None)
    if section.load_in_4bit:
        settings = {k: v for k, v in settings.items() if not k.startswith(("llm_", "load_in_8bit"))}
        settings["bnb_4bit_compute_dtype"] = _DTYPES[section.bnb_4bit_compute_dtype]
    else:
        settings = {"load_in_8bit": True, "llm_int8_threshold": section.llm_int8_threshold}
    placed: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**settings), "dtype": dtype}
    if torch.cuda.is_available():  # each process quantizes onto its own GPU
        placed["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return placed


def new_model(section: ModelSection, tokenizer: Any, *, seed: int) -> Any:
    """A causal LM made from ``model.config``, float32, its weights drawn with `seed`.

    ``vocab_size`` defaults to the tokenizer's length; the tokenizer's special ids go into the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if section.config is None:
        raise ModelError("`model.config` is missing; give one, or `model.name_or_path` to start from a model")
    settings = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    } | section.config
    try:
        config = AutoConfig.for_model(**settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"`model.config` makes no causal LM ({reason}); compare it with the model type's docs"
        ) from None
    fit_tokenizer(model, tokenizer)
    return model


def fit_tokenizer(model: Any, tokenizer: Any) -> None:
    """Check that every token has an embedding row, and write pad and stop ids into the model's configurations."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"{model.config._name_or_path or 'the model'}: the tokenizer has ids up to {highest}, the model "
            f"{rows} embedding rows; use the model's own tokenizer (chatalign doesn't resize vocabularies)"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        stops = stop_token_ids(tokenizer, generation)
        generation.eos_token_id = stops
        generation.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = tokenizer.eos_token_id


def base_ref_of(resolved: Resolved) -> BaseModelRef:
    """The record of a loaded base; raises ModelError where an adapter in `resolved` belongs to another base."""
    found = base_sha256(resolved.base, resolved.revision)
    expected = resolved.expected_base_sha256
    if expected is not None and found is not None and expected != found:
        raise ModelError(
            f"{resolved.adapter}: trained on a base with sha256 {expected[:12]}…, but {resolved.base} has "
            f"{found[:12]}…; give it its own base back"
        )
    revision = None if Path(resolved.base).is_dir() else resolved.revision
    return BaseModelRef(name_or_path=resolved.base, revision=revision, sha256=found)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, attention's too: noise in logprobs makes PPO's ratio differ from 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def refuse_half_precision(model: nn.Module) -> None:
    """Raise ModelError where a trainable weight is stored in half precision."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ModelError(
                f"trainable weight {name} is {str(parameter.dtype).removeprefix('torch.')} and would lose small "
                f"updates; set `model.dtype: float32` (with `train.bf16: true` for speed)"
            )
