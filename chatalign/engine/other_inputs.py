"""Going on from a checkpoint that was saved under other inputs: a change that was allowed by name takes hold.

transformers restores the optimizer's settings and the schedule's rates with their states, and the intervals of logs,
evaluations and saves with the trainer's: a new ``learning_rate`` would be ignored without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from chatalign.errors import CheckpointError, OtherRunError
from chatalign.runs import Run

# What a recipe says of a parameter group; the rest of a group is the optimizer's own.
_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")


def saved_otherwise(place: str, manifest: Mapping[str, Any], run: Run, processes: int) -> bool:
    """Whether a checkpoint was saved under other inputs, which the run was allowed to change.

    Raises OtherRunError where the run never had them, CheckpointError where other than the allowed number of
    processes go on. A checkpoint that says neither is an older chatalign's, and is held to the run's id alone.
    """
    before, mark = manifest["world_size"], manifest["fingerprint"]
    if mark not in (None, run.fingerprint, *run.earlier):
        raise OtherRunError(
            f"{place}: was saved under other inputs (fingerprint {mark[:12]}) than run {run.run_id} ever had; take it "
            f"out of the folder, or give another `output_dir`"
        )
    if before not in (None, processes) and run.allowed_processes != processes:
        raise CheckpointError(
            f"{place}: was saved by {before} processes, and {processes} would go on; start as many, or allow it with "
            f"`--allow-change processes`"
        )
    return mark != run.fingerprint if mark is not None else bool(run.earlier)


def refuse_other_form(trainer: Trainer, place: str) -> None:
    """Raise CheckpointError where optimizer states were saved otherwise than this launch keeps them: whole, or sharded.

    transformers would look for files of its own form, and begin with no states where it finds none.
    """
    own = "DeepSpeed's" if trainer.is_deepspeed_enabled else "FSDP's" if trainer.is_fsdp_enabled else "whole"
    forms = {"optimizer.pt": "whole", "optimizer*": "FSDP's", "global_step*": "DeepSpeed's"}
    saved = next((form for names, form in forms.items() if any(Path(place).glob(names))), "missing")
    if saved != own:
        raise CheckpointError(
            f"{place}: its optimizer states are {saved}, and this launch's would be {own}; go on with the accelerate "
            f"configuration that it was saved under"
        )


def settings_of(trainer: Trainer) -> list[dict[str, Any]]:
    """Of each parameter group what the recipe says, before a checkpoint's is loaded over it."""
    assert trainer.optimizer is not None
    return [{name: group[name] for name in _SETTINGS if name in group} for group in trainer.optimizer.param_groups]


def take_hold(trainer: Trainer, settings: list[dict[str, Any]], place: str) -> None:
    """Put the recipe's own settings back, once the checkpoint's states are loaded; the rate is this step's.

    Raises CheckpointError where the run, as it is now, ends before the checkpoint.
    """
    if trainer.is_deepspeed_enabled:
        raise CheckpointError(f"{place}: DeepSpeed restores its own settings, and no change would take hold; --force")
    state = trainer.state
    if state.global_step > state.max_steps:
        raise CheckpointError(
            f"{place}: is past the {state.max_steps} steps that the run has now; ask for more, or take the change back"
        )
    state.compute_steps(trainer.args, state.max_steps)
    assert trainer.optimizer is not None
    groups = trainer.optimizer.param_groups
    for group, own in zip(groups, settings, strict=True):
        group |= own
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    if not isinstance(schedule, LambdaLR):  # no rate of its recipe may change: see `carry`
        return
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    schedule._last_lr = schedule.get_lr()
    for group, rate in zip(groups, schedule._last_lr, strict=True):
        group["lr"] = rate
