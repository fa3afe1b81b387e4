"""An adapter folded into its base, as one model that needs no peft; refused where that would change its replies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatalign.errors import ModelError
from chatalign.models.adapter_checks import refuse_merge_into_quantized
from chatalign.models.adapters import continue_adapter, save_model
from chatalign.models.heads import load_reward_model
from chatalign.models.load import base_ref_of, fit_tokenizer, load_base
from chatalign.models.resolve import Resolved, resolve
from chatalign.models.tokenizer import load_tokenizer
from chatalign.recipe import ModelSection

_PROBE = ("Hello! What can you do?", "The quick brown fox jumps over the lazy dog.", "1 + 1 =", "你好")
# How far a merged model's logits may move, relative to their norm: rounding of the weights, and no more.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def merge(ref: str | Path, out_folder: str | Path, *, dtype: str = "auto") -> Path:
    """Fold the adapter `ref` (a run or adapter folder) into its base and write the whole model to `out_folder`.

    The sum is formed in float32 and stored in `dtype` (auto: the base's own). The written model is loaded again and
    its logits on a few probes compared with the adapter's. Raises ModelError where `ref` is no adapter, the base is
    stored quantized, `out_folder` isn't empty, or the two disagree.
    """
    out = Path(out_folder)
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out}: isn't empty; give a new folder for the merged model")
    section = ModelSection(name_or_path=str(ref), dtype="float32")
    resolved = resolve(str(ref))
    if resolved.adapter is None:
        raise ModelError(f"{ref}: holds no adapter, so there is nothing to merge")
    stored = _stored_dtype(resolved, dtype)
    tokenizer = load_tokenizer(section)
    model = _adapted(section, resolved, tokenizer)
    before = _probe_logits(model, tokenizer)
    _untie_where_adapted(model)
    merged: Any = _to_dtype(model.merge_and_unload(safe_merge=True), stored)
    aside = out.with_name(f".{out.name}.unchecked")
    shutil.rmtree(aside, ignore_errors=True)  # of a merge that was killed
    try:
        save_model(merged, tokenizer, aside)
        del model, merged
        _compare(before, _probe_logits(_reload(aside, resolved), tokenizer), stored, str(ref))
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _stored_dtype(resolved: Resolved, dtype: str) -> torch.dtype:
    """The precision to store in; refuses a base whose own weights are quantized."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolved.base, revision=resolved.revision, trust_remote_code=False)
    refuse_merge_into_quantized(config, resolved)
    if dtype == "auto":
        return config.dtype or torch.float32
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {dtype}: a merged model is stored in float32, bfloat16, float16 or auto (the base's)")
    return getattr(torch, dtype)


def _adapted(section: ModelSection, resolved: Resolved, tokenizer: Any) -> Any:
    if resolved.kind == "reward_adapter":
        return load_reward_model(section, tokenizer).model
    model = load_base(section, resolved)
    fit_tokenizer(model, tokenizer)
    assert resolved.adapter is not None
    return continue_adapter(model, resolved.adapter, None, base_ref_of(resolved)).eval()


def _untie_where_adapted(model: Any) -> None:
    """Give the output layer weights of its own where it shares the embedding's and either is adapted.

    peft adds an adapter's delta to the shared tensor, which would change both layers (failure 28 of the bank).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base: Any = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if not base.config.tie_word_embeddings or not any(
        isinstance(e, BaseTunerLayer | ModulesToSaveWrapper) for e in ends
    ):
        return
    output: Any = ends[1]
    layer: Any = output.get_base_layer() if isinstance(output, BaseTunerLayer) else output
    layer = getattr(layer, "original_module", layer)
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False


def _to_dtype(model: Any, dtype: torch.dtype) -> Any:
    """`model` in `dtype`, but for a reward model's head, which stays float32."""
    score = model.score.weight.detach().clone() if hasattr(model, "score") else None
    model.to(dtype)
    if score is not None:
        model.score.weight.data = score
    return model


def _probe_logits(model: Any, tokenizer: Any) -> list[Tensor]:
    with torch.no_grad():
        ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in _PROBE]
        return [model(input_ids=row, use_cache=False).logits.float() for row in ids]


def _reload(out: Path, resolved: Resolved) -> Any:
    """The merged model as a stranger would load it, computing in float32 so that only its weights can differ."""
    section = ModelSection(name_or_path=str(out), dtype="float32")
    return load_base(section, resolve(str(out)), scoring=resolved.kind == "reward_adapter").eval()


def _compare(before: list[Tensor], after: list[Tensor], stored: torch.dtype, ref: str) -> None:
    """Raise ModelError where the merged model's logits left the adapter's by more than rounding."""
    moved = max(float((b - a).norm() / a.norm().clamp_min(1e-6)) for a, b in zip(before, after, strict=True))
    if not moved <= _TOLERANCE[stored]:
        raise ModelError(
            f"{ref}: the merged model's logits differ from the adapter's by {moved:.2%}, so nothing was written; "
            f"merge with dtype float32, or go on with the adapter unmerged"
        )
