"""``engine: trl``: TRL's trainers on the rows that we prepared, under our checkpoints, signals and artifact.

TRL tokenizes text itself; here it gets token ids, so that both engines train on the same tokens and the same
targets. It is also how methods that TRL keeps are run (KTO; GRPO and RLOO would follow the same pattern): rows →
TRL's columns, recipe → TRL's configuration, its trainer under :class:`SealedTrainer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from chatalign import tracking
from chatalign.engine.sealed import SealedTrainer
from chatalign.engine.stage import Work, argument_values
from chatalign.errors import DependencyError, RecipeError
from chatalign.models.reference import Reference
from chatalign.recipe import DpoRecipe, KtoRecipe, RewardRecipe, SftRecipe

IGNORED = -100  # transformers' label of a token that is no target


def sft_trainer(work: Work) -> SealedTrainer:
    """``trl.SFTTrainer`` with labels built from our target marks; packs as the recipe says."""
    require_trl()
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # its names load on first use

    recipe = work.recipe
    assert isinstance(recipe, SftRecipe)
    packing = recipe.data.packing
    settings = _settings(work) | {"packing": packing, "max_length": recipe.data.max_length if packing else None}
    return _build(SFTTrainer, SFTConfig, work, settings, _labelled)


def reward_trainer(work: Work) -> SealedTrainer:
    """``trl.RewardTrainer`` with prompt and reply joined on each side."""
    require_trl()
    from trl import RewardConfig, RewardTrainer  # type: ignore[attr-defined]  # its names load on first use

    recipe = work.recipe
    assert isinstance(recipe, RewardRecipe)
    centre = {"center_rewards_coefficient": recipe.reward.center_rewards_coefficient}
    return _build(RewardTrainer, RewardConfig, work, _settings(work) | {"max_length": None} | centre, _joined)


def dpo_trainer(work: Work, reference: Reference) -> SealedTrainer:
    """``trl.DPOTrainer``; its reference is a frozen copy, or TRL's own copy of the adapter that the run starts from."""
    require_trl()
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]  # its names load on first use

    class TokenizedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenized, with TRL's own column names

    recipe = work.recipe
    assert isinstance(recipe, DpoRecipe)
    with_sft = recipe.dpo.sft_weight > 0
    settings = _settings(work) | {
        "max_length": None,
        "beta": recipe.dpo.beta,
        "loss_type": [recipe.dpo.loss_type, *(["sft"] if with_sft else [])],
        "loss_weights": [1.0, recipe.dpo.sft_weight] if with_sft else None,
        "label_smoothing": recipe.dpo.label_smoothing,
        "precompute_ref_log_probs": recipe.dpo.precompute_ref_log_probs,
    }
    return _build(TokenizedDPOTrainer, DPOConfig, work, settings, _as_they_are, ref_model=reference.module)


def kto_trainer(work: Work, reference: Reference) -> SealedTrainer:
    """``trl.KTOTrainer``; replies are moved on by one within a batch for its estimate of the KL."""
    require_trl()
    from trl import KTOConfig, KTOTrainer  # type: ignore[attr-defined]  # its names load on first use

    class TokenizedKTOTrainer(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, _tokenizer: Any, args: Any, _name: str) -> Any:
            if not self.calculate_KL:
                return dataset
            size = args.per_device_train_batch_size
            return dataset.map(_moved_on, batched=True, batch_size=size, keep_in_memory=True)

    recipe = work.recipe
    assert isinstance(recipe, KtoRecipe)
    settings = _settings(work) | {
        "max_length": None,
        "beta": recipe.kto.beta,
        "loss_type": recipe.kto.loss_type,
        "desirable_weight": recipe.kto.desirable_weight,
        "undesirable_weight": recipe.kto.undesirable_weight,
        "train_sampling_strategy": "sequential",  # else a batch's replies would not be those that were moved on
    }
    shuffled = replace(work.rows, train=work.rows.train.shuffle(seed=recipe.train.seed, keep_in_memory=True))
    work = replace(work, rows=shuffled)
    return _build(TokenizedKTOTrainer, KTOConfig, work, settings, _as_they_are, ref_model=reference.module)


def require_trl() -> None:
    """Raise DependencyError where TRL isn't installed."""
    if find_spec("trl") is None:
        raise DependencyError("this recipe's trainer is TRL's, which isn't installed; pip install 'chatalign[trl]'")


def _settings(work: Work) -> dict[str, Any]:
    """TRL's configurations turn bf16 and checkpointing on where they aren't given, so every field is given."""
    values = argument_values(work.recipe, work.run, is_adapter=work.is_adapter)
    train = work.recipe.train
    return {name: value for name, value in values.items() if name != "label_names"} | {
        "bf16": values.get("bf16", False),
        "fp16": train.fp16,
        "gradient_checkpointing": train.gradient_checkpointing,
        "activation_offloading": train.activation_offloading,
        "torch_compile": train.torch_compile,
        "use_liger_kernel": bool(train.use_liger_kernel),
        "liger_kernel_config": train.liger_kernel_config,
        "include_num_input_tokens_seen": "non_padding",
        "push_to_hub": False,
    }


class _CountingOn(SealedTrainer):
    """Keeps the count of ``num_tokens`` in its checkpoints; TRL begins at zero again in each process."""

    _total_train_tokens: int  # TRL's

    def stage_state(self) -> dict[str, Any]:
        return {"num_tokens": self._total_train_tokens}

    def load_stage_state(self, state: Mapping[str, Any]) -> None:
        self._total_train_tokens = int(state.get("num_tokens", 0))


def _build(
    trainer_class: Any,
    config_class: Any,
    work: Work,
    settings: Mapping[str, Any],
    columns: Any,
    **more: Any,
) -> SealedTrainer:
    """TRL's trainer under our checkpoints; raises RecipeError with TRL's reason where it refuses the recipe."""
    shared = {"recipe": work.recipe, "run": work.run, "saved_use_cache": getattr(work.model.config, "use_cache", None)}
    sealed: Any = type(f"Sealed{trainer_class.__name__}", (_CountingOn, trainer_class), shared)
    try:
        trainer: SealedTrainer = sealed(
            model=work.model,
            args=config_class(**settings),
            train_dataset=columns(work.rows.train),
            eval_dataset=None if work.rows.eval is None else columns(work.rows.eval),
            processing_class=work.tokenizer,
            **more,
        )
    except ValueError as error:
        raise RecipeError(f"TRL refuses this recipe: {str(error).splitlines()[0]}") from error
    tracking.attach(trainer, work.recipe, work.run)
    return trainer


def _labelled(rows: Any) -> Any:
    def label(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["supervised"], strict=True)
        return {"labels": [token if target else IGNORED for token, target in pairs]}

    return rows.map(label, remove_columns=["supervised"], keep_in_memory=True)


def _joined(rows: Any) -> Any:
    def join(row: dict[str, Any]) -> dict[str, Any]:
        return {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}

    return rows.map(join, remove_columns=["prompt_ids"], keep_in_memory=True)


def _as_they_are(rows: Any) -> Any:
    return rows


def _moved_on(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    replies = rows["completion_ids"]
    return {"KL_completion_ids": [replies[-1], *replies[:-1]]}
