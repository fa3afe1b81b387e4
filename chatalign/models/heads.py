"""Reward models: a base with one float32 score per token, made, saved, loaded and read at chosen places.

The head is a linear map without bias, drawn from N(0, 1/(d+1)) as in "The N+ Implementation Details of RLHF with
PPO" (arXiv 2403.17031, detail 5), and always float32: in bfloat16 thousands of replies share a few dozen scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatalign.artifact import BaseModelRef
from chatalign.engine.attention import segment_inputs
from chatalign.engine.isolation import computes_in_half, runs_segments
from chatalign.errors import ModelError
from chatalign.models.adapters import (
    DEFAULT,
    load_adapter_weights,
    new_adapter,
    read_adapter,
    read_lora_config,
    ready_to_train,
    refuse_other_lora,
)
from chatalign.models.load import base_ref_of, disable_dropout, fit_tokenizer, load_base
from chatalign.models.resolve import Resolved, local_folder, resolve
from chatalign.models.score_guard import (
    PROBE,
    measure_probe,
    refuse_drift,
    refuse_frozen_head,
    refuse_low_precision,
    refuse_unsaved_head,
)
from chatalign.recipe import ModelSection, QuantizationSection, RewardRecipe

SCORE = "score"


class ScoreHead(nn.Linear):
    """A linear map to one score per place, computed in float32 whatever the model's or autocast's precision."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, d) in any precision → scores (…, 1) in float32."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return super().forward(hidden.float())


def new_score_head(hidden_size: int, *, seed: int) -> ScoreHead:
    """A head with weights from N(0, 1/(d+1)), so that scores start near a standard deviation of 1 or below."""
    head = ScoreHead(hidden_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, (hidden_size + 1) ** -0.5, generator=generator)
    return head


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A scorer to train or to use: an ``AutoModelForSequenceClassification`` with one label, or that under peft."""

    model: Any
    base_ref: BaseModelRef
    is_adapter: bool


def new_reward_model(recipe: RewardRecipe, tokenizer: Any) -> RewardModel:
    """The reward model that a recipe trains.

    From an SFT adapter: a reward adapter that starts from its weights, on the same base, plus a new head. From a
    model with ``lora``: a new adapter and head. Without: all weights. From a reward model: it goes on.
    """
    resolved = resolve(recipe.model.name_or_path or "", revision=recipe.model.revision)
    base_ref = base_ref_of(resolved)
    is_adapter = resolved.adapter is not None or recipe.lora is not None
    if recipe.quantization is not None and not is_adapter:
        raise ModelError("`quantization` freezes the base, and there is no adapter to train; add a `lora` section")
    model = _base_with_head(
        recipe.model, resolved, tokenizer, recipe.quantization, trainable=not is_adapter, seed=recipe.train.seed
    )
    if resolved.adapter is not None:
        model = _reward_adapter(model, resolved, base_ref, lora=recipe.lora)
    elif recipe.lora is not None:
        lora = recipe.lora.model_copy(update={"modules_to_save": _with_score(recipe.lora.modules_to_save)})
        model = new_adapter(model, lora, base_ref, task_type="SEQ_CLS", seed=recipe.train.seed)
    refuse_frozen_head(active_head(model))
    disable_dropout(model)
    ready_to_train(model, gradient_checkpointing=bool(recipe.train.gradient_checkpointing) and is_adapter)
    return RewardModel(model=model, base_ref=base_ref, is_adapter=is_adapter)


def load_reward_model(
    section: ModelSection, tokenizer: Any, *, quantization: QuantizationSection | None = None
) -> RewardModel:
    """A finished reward model, frozen and in eval mode; `tokenizer` is its own.

    Raises ModelError where it has no head, GuardError where its head counts in low precision or its scores' scale
    isn't that which was stored with it.
    """
    resolved = resolve(section.name_or_path or "", revision=section.revision)
    if resolved.kind == "adapter":
        raise ModelError(
            f"{section.name_or_path}: a language model's adapter, no reward model; train one (chatalign reward)"
        )
    base_ref = base_ref_of(resolved)
    model = _base_with_head(section, resolved, tokenizer, quantization, trainable=False, seed=None)
    if resolved.adapter is not None:
        model = _reward_adapter(model, resolved, base_ref, lora=None)
    refuse_low_precision(active_head(model))
    if stored := stored_probe(resolved, model.config):
        refuse_drift(stored, measure_probe(model, tokenizer, half=computes_in_half(model)), resolved.source)
    return RewardModel(
        model=model.eval().requires_grad_(False), base_ref=base_ref, is_adapter=resolved.adapter is not None
    )


def _base_with_head(
    section: ModelSection,
    resolved: Resolved,
    tokenizer: Any,
    quantization: QuantizationSection | None,
    *,
    trainable: bool,
    seed: int | None,
) -> Any:
    """The base as a sequence classifier with a float32 head: the saved one, else a new one where `seed` is given."""
    model = load_base(section, resolved, quantization=quantization, trainable=trainable, scoring=True)
    old = getattr(model, SCORE, None)
    if not isinstance(old, nn.Linear):
        raise ModelError(
            f"{resolved.base}: {type(model).__name__} has no linear `score` head; take another architecture"
        )
    saved = _saved_score(resolved)
    if saved is None and seed is None:
        raise ModelError(
            f"{resolved.source}: has no `score` weights, so it is no reward model; train one (chatalign reward)"
        )
    head = new_score_head(old.in_features, seed=seed or 0)
    if saved is not None:
        with torch.no_grad():
            head.weight.copy_(saved)
    setattr(model, SCORE, head.to(old.weight.device))
    fit_tokenizer(model, tokenizer)
    return model


def stored_probe(resolved: Resolved, config: Any) -> dict[str, Any] | None:
    """The scale of the probe's scores as of saving: from the run, or from the configuration published with it."""
    stored = resolved.artifact.extra.get(PROBE) if resolved.artifact is not None else None
    return stored or getattr(config, PROBE, None)


def _saved_score(resolved: Resolved) -> Tensor | None:
    """The head's weights in their saved precision: loading a bfloat16 model would round them."""
    if resolved.adapter is not None:
        return next((t for name, t in read_adapter(resolved.adapter).items() if _is_score(name)), None)
    return _score_in(local_folder(resolved.base, resolved.revision))


def _score_in(folder: Path | None) -> Tensor | None:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")) if folder else []:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open's handle is no mapping
                if _is_score(name):
                    return file.get_tensor(name)
    return None


def refuse_unsaved_score(model: Any, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Raise GuardError where a reward model that was just saved to `folder` has not its trained head there.

    `state_dict` is the gathered one where weights are sharded.
    """
    gathered = {name: tensor for name, tensor in (state_dict or {}).items() if f".{SCORE}." in f".{name}"}
    copies = [tensor for name, tensor in gathered.items() if "modules_to_save" in name] or list(gathered.values())
    trained = copies[0] if copies else next(active_head(model).parameters())
    refuse_unsaved_head(trained, _score_in(folder), folder)


def _is_score(name: str) -> bool:
    return name.endswith(f"{SCORE}.weight")


def _with_score(modules: list[str] | None) -> list[str]:
    return sorted({*(modules or []), SCORE})


def _reward_adapter(model: Any, resolved: Resolved, base_ref: BaseModelRef, *, lora: Any) -> Any:
    """`model` under the adapter of `resolved`, as a sequence classifier whose head is trained and saved with it."""
    from peft import get_peft_model

    folder = resolved.adapter
    assert folder is not None
    config = read_lora_config(folder)
    if lora is not None:
        refuse_other_lora(lora, config, folder)
        config.lora_dropout = lora.lora_dropout
    config.task_type, config.inference_mode = "SEQ_CLS", False
    config.modules_to_save = _with_score(config.modules_to_save)
    config.base_model_name_or_path = base_ref.name_or_path
    peft_model = get_peft_model(model, config, adapter_name=DEFAULT)
    load_adapter_weights(peft_model, folder, DEFAULT, heads=resolved.kind == "reward_adapter")
    return peft_model


def scores_at(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores [P], float32, at ``pool_positions`` [P] of a flat batch (``input_ids`` [1, T], ``segments`` …).

    `model` may be wrapped (DDP, FSDP, peft): the forward that runs is the wrapper's. It must run the segment
    attention (:func:`chatalign.engine.isolation.enable_segments`), else ModelError: replies would see each other.
    """
    if not runs_segments(model):
        raise ModelError("the reward model doesn't run the segment attention; call enable_segments(model) first")
    captured: list[Tensor] = []
    head = active_head(model)
    handle = head.register_forward_hook(lambda _module, _inputs, output: captured.append(output))
    try:
        output = model(**segment_inputs(dict(batch), batch["pool_positions"]))
    finally:
        handle.remove()
    per_place_T = captured[-1][0, :, 0]
    # The wrapper's own output must be part of the graph: FSDP prepares its backward pass from there.
    return per_place_T[batch["pool_positions"]] + 0.0 * output.logits.sum()


def active_head(model: Any) -> nn.Module:
    """The score head that the forward runs: the adapter's trained copy under peft."""
    from peft.utils import ModulesToSaveWrapper

    wrapped = None
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != SCORE:
            continue
        if isinstance(module, ModulesToSaveWrapper):
            return module.modules_to_save[module.active_adapters[0]]
        wrapped = wrapped or module
    if wrapped is None:
        raise ModelError(f"{type(model).__name__} has no `score` head; load it with load_reward_model")
    return wrapped
