"""What a checkpoint can't carry over into a changed run, and why: refused even where the change is allowed by name.

All else takes hold where the run goes on. That the rows to come are those that the run has yet to see is held by
:mod:`chatalign.engine.replay` where the native engine reads them. Light: no torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatalign.changes import PROCESSES, Change, Settings, covers

_WEIGHTS = "the checkpoint's weights are of the one before"
_ORDER = "the rows already seen were drawn by the one before"
_START = "it acts when a run begins, and the trained weights are the checkpoint's"
_POSITION = "the place in the rollout is counted in it"
_REPLIES = "the replies in the checkpoint were drawn with the one before"
_SCALE = "the checkpoint's value function and score scale were learned from the one before"

# Dotted keys of a recipe; each stands for those below it too.
_NEVER: dict[str, str] = {
    "stage": "the checkpoint is another stage's",
    "engine": "the checkpoint is the other engine's",
    "from_scratch": _START,
    "pretrained": _START,
    "pretrained_sha256": _START,
    "quantization": "the weights were trained on the base as it was before",
    "model.config": _WEIGHTS,
    "model.chat_template_path": "the rows already seen were tokenized by the one before",
    "model.tokenizer_name_or_path": "the rows already seen were tokenized by the one before",
    "lora": _WEIGHTS,
    "train.optim": "the checkpoint's optimizer states are of the one before",
    "train.fp16": "the checkpoint holds the loss scale of fp16, or lacks it",
    "train.seed": _ORDER,
    "train.data_seed": _ORDER,
    "value_model": _WEIGHTS,
    "reward_model": _SCALE,
    "ppo.normalize_reward": _SCALE,
    "ppo.value": _WEIGHTS,
    "ppo.value_init": _START,
    "ppo.rollout_batch_size": _POSITION,
    "ppo.num_ppo_epochs": _POSITION,
    "ppo.num_mini_batches": _POSITION,
    "ppo.temperature": _REPLIES,
    "ppo.rollout_engine": _REPLIES,
}
_LORA_CARRIED = ("lora.lora_alpha", "lora.alpha_pattern", "lora.use_rslora", "lora.lora_dropout")
_SCHEDULE = (
    "train.learning_rate",
    "train.lr_scheduler_type",
    "train.lr_scheduler_kwargs",
    "train.warmup_steps",
    "train.max_steps",
    "train.num_train_epochs",
)
_NO_FORMULA = ("reduce_lr_on_plateau", "greedy")  # schedules that are no function of the step
_ROWS_A_STEP = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps", PROCESSES)


def reasons(changes: Sequence[Change], before: Settings, now: Settings) -> dict[str, str]:
    """Why a checkpoint can't carry some changes over, by their keys; `before` and `now` are the two recipes."""
    found = {change.key: _reason(change, before, now) for change in changes}
    found |= _rows_a_step(changes, before, now)
    return {key: reason for key, reason in found.items() if reason}


def _reason(change: Change, before: Settings, now: Settings) -> str | None:
    key = change.key
    kernel = key in ("model.attention", "model.dtype")
    if covers("model", key) and not kernel and None in (now.get("lora"), before.get("lora")):
        return "the trained weights are the checkpoint's, whatever model is named"
    if key in _LORA_CARRIED and now.get("lora"):
        return None
    for never, reason in _NEVER.items():
        if covers(never, key):
            return reason
    schedules = {settings.get("train", {}).get("lr_scheduler_type") for settings in (before, now)}
    if any(covers(name, key) for name in _SCHEDULE) and schedules & set(_NO_FORMULA):
        return f"the rate under {' and '.join(sorted(schedules & set(_NO_FORMULA)))} is no function of the step"
    if covers("data", key) and not covers("data.eval_datasets", key):
        return _rows(now)
    return _ppo(change, now) if now["stage"] == "ppo" else None


def _rows(now: Settings) -> str | None:
    if now["stage"] == "ppo":
        return "which prompts were answered is counted in the rows of before"
    if _by_trl(now):
        return "TRL's loader can't tell the rows already seen from those to come"
    return None


def _ppo(change: Change, now: Settings) -> str | None:
    key = change.key
    if key == "ppo.kl_coef" and now["ppo"]["kl_control"] == "adaptive":
        return "the controller has moved on from it, and the checkpoint keeps where it is"
    if key == "ppo.value_learning_rate" and None in (change.before, change.now):
        return "the checkpoint's optimizer states are in other groups"
    if covers("ppo.rewards", key) and not (key.endswith((".weight", ".function", ".function.contents"))):
        return _SCALE
    return None


def _rows_a_step(changes: Sequence[Change], before: Settings, now: Settings) -> dict[str, str]:
    """Batch size, accumulation and processes go together: where a step has the same rows, nothing moves."""
    changed = {change.key: change for change in changes if change.key in _ROWS_A_STEP}
    if not changed or now["stage"] == "ppo":  # PPO's steps are shares of a rollout, whatever they are cut into
        return {}
    if _by_trl(now):
        return dict.fromkeys(changed, "TRL's loader can't tell the rows already seen from those to come")
    ratio = 1.0
    for change in changed.values():
        ratio *= change.now / change.before
    if ratio == 1:
        return {}
    shares = "`per_device_train_batch_size` × `gradient_accumulation_steps` × processes"
    return dict.fromkeys(changed, f"a step would have {ratio:g} times the rows; keep {shares} as it was")


def _by_trl(settings: Mapping[str, Any]) -> bool:
    return settings["stage"] == "kto" or settings.get("engine") == "trl"
