"""KTO on unpaired feedback, by TRL's trainer: ``chatalign kto RECIPE`` or ``accelerate launch -m chatalign.kto``.

The recipe, the checks, the checkpoints and the artifact are those of every stage (Ethayarajh et al., 2402.01306).
Methods that TRL keeps are added like this one.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that follows is imported: a wrong recipe is refused without it
    from chatalign.launch import stage_main

    stage_main("kto")

from chatalign.artifact import Artifact
from chatalign.data import prepare
from chatalign.engine.dpo_trainer import refuse_moved, require_reference
from chatalign.engine.stage import Work, finish, last_means, train
from chatalign.engine.trl_engine import kto_trainer, require_trl
from chatalign.models.adapters import load_policy
from chatalign.models.tokenizer import load_tokenizer
from chatalign.phases import phase
from chatalign.recipe import KtoRecipe
from chatalign.runs import open_run


def run(recipe: KtoRecipe) -> Artifact:
    """Train the recipe's policy on labelled replies and save it; raises a ChatalignError where it can't be done."""
    require_trl()
    opened = open_run(recipe)
    with phase("data"):
        tokenizer = load_tokenizer(recipe.model, chat=recipe.data.apply_chat_template)
        prepared = prepare(recipe.data, tokenizer, "unpaired", seed=recipe.train.seed)
    with phase("model"):
        policy = load_policy(recipe, tokenizer)
        reference = require_reference(policy, "KTO")
        sha256_at_start = reference.sha256()
    work = Work(
        recipe=recipe,
        run=opened,
        model=policy.model,
        is_adapter=policy.is_adapter,
        tokenizer=tokenizer,
        rows=prepared,
    )
    trainer = kto_trainer(work, reference)
    wall_s = train(trainer, opened)
    refuse_moved(reference, sha256_at_start, trainer)
    return finish(
        run=opened,
        recipe=recipe,
        trainer=trainer,
        tokenizer=tokenizer,
        data=prepared.used,
        base_ref=policy.base_ref,
        kind="adapter" if policy.is_adapter else "model",
        metrics=last_means(trainer),
        extra={"reference": reference.way, "reference_sha256": sha256_at_start},
        wall_s=wall_s,
    )
