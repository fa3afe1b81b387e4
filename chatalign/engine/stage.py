"""What all stages do the same way: arguments from the recipe, training from the last checkpoint, the artifact."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import TrainingArguments

from chatalign import checkpoint
from chatalign.artifact import Artifact, BaseModelRef, DataUsed, Kind, hash_files
from chatalign.data import Prepared
from chatalign.engine import levers
from chatalign.engine.defaults import learning_rate
from chatalign.engine.disk import model_bytes, room_for
from chatalign.engine.memory import give_back_freed
from chatalign.errors import RecipeError
from chatalign.models.adapters import save_model
from chatalign.models.generation import refuse_other_stops
from chatalign.models.heads import refuse_unsaved_score
from chatalign.models.tokenizer import text_hashes
from chatalign.phases import phase
from chatalign.recipe import StageRecipe
from chatalign.runs import Run
from chatalign.tracking import report_to
from chatalign.unfinished import read_run_file

# Read by the stage or the trainer base, not by TrainingArguments.
_NOT_PASSED = {"learning_rate", "save_total_limit", "max_hours", *levers.KEYS}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage's trainer is made from, ours or TRL's."""

    recipe: StageRecipe
    run: Run
    model: Any
    is_adapter: bool
    tokenizer: Any
    rows: Prepared


def native_settings(work: Work) -> dict[str, Any]:
    """The keyword arguments that all our trainers take."""
    return {
        "recipe": work.recipe,
        "run": work.run,
        "args": training_arguments(work.recipe, work.run, is_adapter=work.is_adapter),
        "model": work.model,
        "tokenizer": work.tokenizer,
        "train_rows": work.rows.train,
        "eval_rows": work.rows.eval,
    }


class SavesModel(Protocol):
    """What `finish` needs of a trainer: ours, or one of TRL's."""

    model: Any
    model_wrapped: Any
    accelerator: Any
    args: TrainingArguments
    state: Any


def argument_values(recipe: StageRecipe, run: Run, *, is_adapter: bool) -> dict[str, Any]:
    """The keyword arguments of ``TrainingArguments`` (or a TRL config) for a recipe's run."""
    given = recipe.train.model_dump(exclude=_NOT_PASSED)
    # False too: transformers warns of an old name at whatever value it is given.
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    chosen = levers.choose(recipe, levers.hardware(use_cpu=recipe.train.use_cpu))
    return (
        given
        | chosen.arguments()
        | {
            "output_dir": str(run.checkpoints),
            "learning_rate": learning_rate(recipe, is_adapter=is_adapter),
            "save_total_limit": None,  # transformers would delete the last good checkpoint before ours is sealed
            "report_to": report_to(recipe) or "none",
            "run_name": recipe.run_name or run.folder.name,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,  # it would hide a loss that is not finite, and sync at each micro-batch
            "dataloader_pin_memory": torch.cuda.is_available() and not recipe.train.use_cpu,
            "label_names": [],
            # Said where there is nothing else, since transformers refuses bf16 on a CPU that it wasn't told of.
            "use_cpu": recipe.train.use_cpu or not torch.accelerator.is_available(),
        }
    )


def training_arguments(recipe: StageRecipe, run: Run, *, is_adapter: bool) -> TrainingArguments:
    """``TrainingArguments`` for a recipe's run; the learning rate is the stage's default where none is given.

    Raises RecipeError with transformers' reason where it refuses a value.
    """
    try:
        return TrainingArguments(**argument_values(recipe, run, is_adapter=is_adapter))
    except ValueError as error:
        raise RecipeError(f"`train`: {str(error).splitlines()[0]}") from error


@phase("train")
def train(trainer: Any, run: Run) -> float:
    """Train, going on from the newest whole checkpoint of this run; returns the seconds that this took.

    Raises CheckpointError, NonFiniteError or Interrupted.
    """
    started = time.perf_counter()
    found = checkpoint.latest_valid(run.checkpoints, run.run_id)
    if trainer.args.should_save:
        checkpoint.tidy(run.checkpoints, found, keep=trainer.recipe.train.save_total_limit, run_id=run.run_id)
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    give_back_freed()  # a step's activations: the plots and tables of a report would come on top of them
    return time.perf_counter() - started


@phase("save")
def finish(
    *,
    run: Run,
    recipe: StageRecipe,
    trainer: SavesModel,
    tokenizer: Any,
    data: list[DataUsed],
    base_ref: BaseModelRef | None,
    kind: Kind,
    metrics: Mapping[str, float],
    extra: Mapping[str, Any] | None = None,
    wall_s: float = 0.0,
) -> Artifact:
    """Save ``model/`` and, last, ``artifact.json``; every process calls it, the main one writes."""
    accelerator = trainer.accelerator
    sharded = getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False)
    state_dict = accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    artifact = Artifact(
        stage=recipe.stage,
        kind=kind,
        run_id=run.run_id,
        fingerprint=run.fingerprint,
        base_model=base_ref,
        parents=run.parents,
        recipe=recipe.model_dump(mode="json"),
        data=data,
        seeds={"seed": recipe.train.seed, "data_seed": recipe.train.data_seed or recipe.train.seed},
        metrics={name: float(value) for name, value in metrics.items()},
        extra=dict(extra or {}) | _how_it_ran(trainer, run),
        wall_s=wall_s,
        tokens_seen=int(getattr(trainer.state, "num_input_tokens_seen", 0)),
        tokens_per_s=float(getattr(trainer, "tokens_per_s", 0.0)),
    )
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        restore_for_use(model, getattr(trainer, "saved_use_cache", None))
        if state_dict is not None:
            state_dict = without_tied_copies(model, state_dict)
        if run.model_folder.exists():  # of a save that was killed: safetensors leaves `.tmp…`, as large as the weights
            shutil.rmtree(run.model_folder)
        with room_for(run.model_folder, model_bytes(model), "the finished model"):
            save_model(model, tokenizer, run.model_folder, base_ref=base_ref, state_dict=state_dict)
        if kind in ("reward_model", "reward_adapter"):
            refuse_unsaved_score(model, run.model_folder, state_dict)
        elif getattr(model, "generation_config", None) is not None:
            refuse_other_stops(run.model_folder, tokenizer)
        hashes = text_hashes(tokenizer, run.model_folder)
        artifact = artifact.model_copy(update={"files": hash_files(run.folder), **hashes})
        artifact.save(run.folder)
    accelerator.wait_for_everyone()
    return artifact


def _how_it_ran(trainer: SavesModel, run: Run) -> dict[str, Any]:
    """What the trainer chose, and what was changed while the run was unfinished."""
    found = {"ran_with": getattr(trainer, "ran_with", None), "changes": read_run_file(run.folder).get("changes")}
    return {name: value for name, value in found.items() if value}


def without_tied_copies(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict gathered from shards, each tied weight once, under the name that transformers saves it by."""
    once = {name for name, _ in model.named_parameters()}
    copies = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in state_dict.items() if name not in copies}


def restore_for_use(model: Any, use_cache: bool | None) -> None:
    """Undo what training set in the configuration that is saved."""
    if use_cache is not None:
        model.config.use_cache = use_cache


def last_means(trainer: Any) -> dict[str, float]:
    """The last logged value of each metric of a run: training means by their name, evaluation ones as eval_NAME."""
    found: dict[str, float] = {}
    for logged in trainer.state.log_history:
        found |= {name: value for name, value in logged.items() if isinstance(value, int | float)}
    dropped = ("step", "epoch", "learning_rate", "tokens", "total_flos", "eval_runtime")
    speeds = ("tokens_per_s", "_per_second")
    return {
        name: float(value)
        for name, value in found.items()
        if name not in dropped and not name.startswith("train_") and not name.endswith(speeds)
    }
