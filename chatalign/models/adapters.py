"""LoRA adapters and the policy: new ones, ones handed on by an earlier stage, and how each is saved.

The hand-off: a run that starts from an adapter goes on training it ("default") on the base it was trained on, and
holds it once more, frozen, as "reference". No merging between stages, no reference that silently becomes the base.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatalign.artifact import BaseModelRef
from chatalign.errors import ModelError, RecipeError
from chatalign.models.adapter_checks import (
    other_adapter,
    refuse_incomplete,
    refuse_no_effect,
    refuse_unread,
    refuse_unsaved,
    whole_shapes,
)
from chatalign.models.generation import refuse_other_stops
from chatalign.models.load import (
    base_ref_of,
    disable_dropout,
    fit_tokenizer,
    load_base,
    new_model,
    refuse_half_precision,
)
from chatalign.models.reference import REFERENCE_ADAPTER, Reference
from chatalign.models.resolve import Resolved, base_sha256, resolve, write_base_ref
from chatalign.models.tokenizer import stop_token_ids
from chatalign.recipe import LoraSection, ModelSection, QuantizationSection, StageRecipe

DEFAULT = "default"
WEIGHTS_FILE = "adapter_model.safetensors"
_NEEDS_REFERENCE = ("dpo", "ppo", "kto")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A causal LM to train, what it is held to (None in sft and pretrain), and the base it hangs on."""

    model: Any
    reference: Reference | None
    base_ref: BaseModelRef
    is_adapter: bool


def load_policy(recipe: StageRecipe, tokenizer: Any) -> Policy:
    """The policy that a recipe trains, with its reference where the stage needs one.

    From an adapter: that adapter goes on, its frozen twin is the reference. From a model with ``lora``: a new
    adapter, the model without it is the reference. From a model without: full fine-tuning, a frozen copy.
    Raises ModelError (wrong base, weights missing, wrong kind) or RecipeError (``lora`` contradicts the adapter).
    """
    with_reference = recipe.stage in _NEEDS_REFERENCE
    if recipe.model.config is not None:
        model = new_model(recipe.model, tokenizer, seed=recipe.train.seed)
        base_ref = BaseModelRef(name_or_path=f"new {recipe.model.config['model_type']}")
        return Policy(model=model, reference=None, base_ref=base_ref, is_adapter=False)
    resolved = _resolve_policy(recipe.model)
    _refuse_quantized_full(recipe, resolved)
    base_ref = base_ref_of(resolved)
    is_adapter = resolved.adapter is not None or recipe.lora is not None
    model = load_base(recipe.model, resolved, quantization=recipe.quantization, trainable=not is_adapter)
    fit_tokenizer(model, tokenizer)
    if resolved.adapter is not None:
        model = continue_adapter(model, resolved.adapter, recipe.lora, base_ref)
        if with_reference:
            attach_adapter(model, resolved.adapter, REFERENCE_ADAPTER, trainable=False)
    elif recipe.lora is not None:
        model = new_adapter(model, recipe.lora, base_ref, task_type="CAUSAL_LM", seed=recipe.train.seed)
    if with_reference:
        disable_dropout(model)
    ready_to_train(model, gradient_checkpointing=bool(recipe.train.gradient_checkpointing) and is_adapter)
    reference = _reference(model, resolved, is_adapter) if with_reference else None
    if reference is not None:
        reference.refuse_trained()
    return Policy(model=model, reference=reference, base_ref=base_ref, is_adapter=is_adapter)


def _resolve_policy(section: ModelSection) -> Resolved:
    resolved = resolve(section.name_or_path or "", revision=section.revision)
    if resolved.kind not in ("model", "adapter"):
        raise ModelError(
            f"{section.name_or_path}: a {resolved.kind.replace('_', ' ')}, not a language model; start from one"
        )
    return resolved


def _refuse_quantized_full(recipe: StageRecipe, resolved: Resolved) -> None:
    if recipe.quantization is not None and recipe.lora is None and resolved.adapter is None:
        raise RecipeError("`quantization` freezes the base, and there is no adapter to train; add a `lora` section")


def _reference(model: Any, resolved: Resolved, is_adapter: bool) -> Reference:
    if resolved.adapter is not None:
        return Reference(model, way="adapter")
    if is_adapter:
        return Reference(model, way="disabled")
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    return Reference(model, way="copy", module=twin)


def ready_to_train(model: Any, *, gradient_checkpointing: bool) -> None:
    """Train mode; inputs that carry gradients through checkpointed frozen layers.

    Raises ModelError where a trainable weight isn't float32, GuardError where one would not be saved.
    """
    from peft import PeftModel, get_peft_model_state_dict

    refuse_half_precision(model)
    if isinstance(model, PeftModel):
        saved = get_peft_model_state_dict(model, adapter_name=DEFAULT, save_embedding_layers=False)
        refuse_unsaved(model, saved, DEFAULT)
    if gradient_checkpointing:  # else a frozen embedding cuts the graph and the adapters get no gradient
        model.enable_input_require_grads()
    model.train()


def new_adapter(model: Any, lora: LoraSection, base_ref: BaseModelRef, *, task_type: str, seed: int) -> Any:
    """`model` under a new LoRA adapter drawn with `seed`; ModelError where its targets aren't in the model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type=task_type, **lora.model_dump())
    config.base_model_name_or_path = base_ref.name_or_path
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(model, config, adapter_name=DEFAULT)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{base_ref.name_or_path}: `lora` doesn't fit it ({reason}); set `lora.target_modules: all-linear`"
        ) from None


def continue_adapter(model: Any, folder: Path, lora: LoraSection | None, base_ref: BaseModelRef) -> Any:
    """`model` under the saved adapter of `folder`, trainable; RecipeError where `lora` contradicts the adapter."""
    from peft import get_peft_model

    config = read_lora_config(folder)
    if lora is not None:
        refuse_other_lora(lora, config, folder)
        config.lora_dropout = lora.lora_dropout
    config.inference_mode = False
    config.base_model_name_or_path = base_ref.name_or_path
    try:
        peft_model = get_peft_model(model, config, adapter_name=DEFAULT)
    except ValueError as error:
        raise ModelError(f"{folder}: doesn't fit {base_ref.name_or_path} ({str(error).splitlines()[0]})") from None
    load_adapter_weights(peft_model, folder, DEFAULT)
    return peft_model


def read_lora_config(folder: Path) -> Any:
    """The LoraConfig of an adapter's folder."""
    from peft import LoraConfig

    return LoraConfig.from_pretrained(str(folder))


def refuse_other_lora(lora: LoraSection, config: Any, folder: Path) -> None:
    """Raise RecipeError where a recipe's ``lora`` contradicts the adapter that it goes on with."""
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern"):
        asked, saved = getattr(lora, key), getattr(config, key)
        if asked != saved:
            raise RecipeError(
                f"`lora.{key}: {asked}` contradicts the adapter of {folder}, which has {saved}; "
                f"take `lora` out (the adapter goes on as it is), or merge the adapter first (chatalign merge)"
            )
    targets = lora.target_modules
    if not isinstance(targets, str) and set(targets) != set(config.target_modules):
        raise RecipeError(
            f"`lora.target_modules` are not those of the adapter of {folder} ({sorted(config.target_modules)}); "
            f"take `lora` out (the adapter goes on as it is)"
        )


def attach_adapter(model: Any, folder: Path, name: str, *, trainable: bool, heads: bool = True) -> None:
    """Put the saved adapter of `folder` beside those of a peft model, under `name`; it isn't made active.

    With `heads` false its saved whole modules (a reward model's ``score``) are left out: only the LoRA weights
    come, so that a reward adapter can hang on a causal LM's base. Every other adapter keeps its gradient flags.
    """
    config = read_lora_config(folder)
    config.inference_mode = not trainable
    if not heads:
        config.modules_to_save = None
        config.task_type = next(iter(model.peft_config.values())).task_type
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.add_adapter(name, config)
    load_adapter_weights(model, folder, name, heads=heads)
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)
    if trainable:
        model.set_requires_grad(name)


def load_adapter_weights(model: Any, folder: Path, name: str, *, heads: bool = True) -> None:
    """Read an adapter's weights into adapter `name` of a peft model; every weight, or ModelError.

    With `heads` false, weights in the file that are no LoRA weights are passed over, and none are demanded.
    peft would warn of a missing weight and go on with a random one (failure 30 of the bank).
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = read_adapter(folder)
    refuse_no_effect(folder, tensors)
    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if not heads:
        expected = {key for key in expected if "lora_" in key}
        tensors = {key: tensor for key, tensor in tensors.items() if "lora_" in key}
        own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        fill = {key: tensor for key, tensor in own.items() if key not in expected}
    else:
        fill = {}
    if missing := sorted(expected - set(tensors)):
        raise other_adapter(
            folder, f"{len(missing)} of the adapter's weights are missing, such as {missing[0]}", "restore its file"
        )
    if extra := sorted(set(tensors) - expected):
        raise ModelError(
            f"{folder}: {len(extra)} of the adapter's weights have no place in this base, such as {extra[0]}; "
            f"load it on the base it was trained on"
        )
    try:
        set_peft_model_state_dict(model, tensors | fill, adapter_name=name)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{folder}: the adapter's shapes are not this base's ({reason}); use its own base") from None
    refuse_unread(folder, tensors, get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder, on the CPU; safetensors only."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ModelError(f"{folder}: has no {WEIGHTS_FILE}; save the adapter as safetensors (pickles aren't read)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged ({error}); restore it") from None


def save_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    base_ref: BaseModelRef | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what is published: adapter or whole model, tokenizer with template, generation config with all stops.

    `model` is unwrapped. `state_dict` is the gathered one where weights are sharded (FSDP, ZeRO-3). Of an adapter
    only "default" is written, with ``base_model.json`` beside it.
    """
    from peft import PeftModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel):
        _save_adapter(model, folder, base_ref, state_dict)
    else:
        inner.save_pretrained(folder, state_dict=state_dict, safe_serialization=True)
        whole = dict(inner.named_parameters()) if state_dict is None else state_dict
        refuse_incomplete(whole_shapes(inner), whole, folder)
    tokenizer.save_pretrained(folder)
    generation = getattr(inner, "generation_config", None)
    if generation is not None:
        generation = copy.deepcopy(generation)
        generation.eos_token_id = stop_token_ids(tokenizer, generation)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.save_pretrained(folder)


def _save_adapter(
    model: Any, folder: Path, base_ref: BaseModelRef | None, state_dict: Mapping[str, Tensor] | None
) -> None:
    """What ``PeftModel.save_pretrained`` writes, without its look-up on the Hub and its empty model card."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=DEFAULT, save_embedding_layers=False)
    refuse_unsaved(model, tensors, DEFAULT)
    saved = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(saved, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    refuse_incomplete(whole_shapes(model, DEFAULT), saved, folder)
    config = copy.deepcopy(model.peft_config[DEFAULT])
    config.inference_mode = True
    if config.modules_to_save:  # peft appends its classifier names again at every load
        config.modules_to_save = sorted(set(config.modules_to_save) & _saved_modules(saved)) or None
    if not isinstance(config.target_modules, str):  # peft keeps a set, whose order changes from process to process
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    if base_ref is None:
        base = config.base_model_name_or_path
        base_ref = BaseModelRef(
            name_or_path=base, revision=config.revision, sha256=base_sha256(base, config.revision or "main")
        )
    write_base_ref(folder, base_ref)


def _saved_modules(tensors: Mapping[str, Tensor]) -> set[str]:
    return {part for name in tensors if "lora_" not in name for part in name.split(".")}


def load_inference(section: ModelSection, tokenizer: Any, *, quantization: QuantizationSection | None = None) -> Any:
    """A language model to generate or score with: frozen, in eval mode, its adapter on where it has one."""
    resolved = _resolve_policy(section)
    base_ref = base_ref_of(resolved)
    model = load_base(section, resolved, quantization=quantization)
    if resolved.artifact is not None and not section.chat_template_path:
        refuse_other_stops(resolved.source, tokenizer)
    fit_tokenizer(model, tokenizer)
    if resolved.adapter is not None:
        model = continue_adapter(model, resolved.adapter, None, base_ref)
    return model.eval().requires_grad_(False)
