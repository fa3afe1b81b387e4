"""A PPO run that goes on under a change: both parameter groups, the penalty and the length are the new recipe's."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatalign import ppo
from chatalign.errors import ChangedRunError
from chatalign.unfinished import settle

from .conftest import LORA, Make, built
from .test_resume import go_on_from
from .test_run import logged

OVER = {
    "lora": LORA,
    "ppo": {"value_learning_rate": 1e-2},
    "train": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None},
}


def test_a_change_takes_hold_in_every_group(make_recipe: Make) -> None:
    whole = make_recipe("whole", OVER)
    ppo.run(whole)
    new = {"value_learning_rate": 4e-2, "kl_coef": 0.5, "total_episodes": 24}
    changed = make_recipe(
        "changed", {**OVER, "ppo": {**OVER["ppo"], **new}, "train": {**OVER["train"], "learning_rate": 3e-3}}
    )
    go_on_from(Path(whole.output_dir), 2, Path(changed.output_dir))
    with pytest.raises(ChangedRunError, match=r"ppo\.kl_coef: 0\.05 → 0\.5"):
        built(changed)
    settle(changed, processes=1, allow=["ppo", "train.learning_rate"])
    trainer = built(changed)
    trainer.train(resume_from_checkpoint=str(Path(changed.output_dir) / "checkpoints" / "checkpoint-2"))
    rates = {group["lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {3e-3, 4e-2}
    assert trainer.state.global_step == 12
    coefs = [line["objective/kl_coef"] for line in logged(changed) if "objective/kl_coef" in line]
    assert coefs == [0.5, 0.5]  # of the two rollouts that followed
