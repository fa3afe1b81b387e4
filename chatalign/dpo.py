"""Direct preference optimisation: ``chatalign dpo RECIPE`` or ``accelerate launch -m chatalign.dpo RECIPE``.

The reference is the model that the run starts from, whatever form it has (a merged model, an SFT adapter), which is
checked before the first update (Rafailov et al., 2305.18290).
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that follows is imported: a wrong recipe is refused without it
    from chatalign.launch import stage_main

    stage_main("dpo")

from chatalign.artifact import Artifact
from chatalign.data import prepare
from chatalign.engine import trl_engine
from chatalign.engine.dpo_trainer import DpoTrainer, refuse_moved, require_reference
from chatalign.engine.stage import Work, finish, last_means, native_settings, train
from chatalign.models.adapters import load_policy
from chatalign.models.tokenizer import load_tokenizer
from chatalign.phases import phase
from chatalign.recipe import DpoRecipe
from chatalign.runs import open_run


def run(recipe: DpoRecipe) -> Artifact:
    """Train the recipe's policy on preference pairs and save it; raises a ChatalignError where it can't be done."""
    opened = open_run(recipe)
    with phase("data"):
        tokenizer = load_tokenizer(recipe.model, chat=recipe.data.apply_chat_template)
        prepared = prepare(recipe.data, tokenizer, "preference", seed=recipe.train.seed)
    with phase("model"):
        policy = load_policy(recipe, tokenizer)
        reference = require_reference(policy, "DPO")
        sha256_at_start = reference.sha256()
    work = Work(
        recipe=recipe,
        run=opened,
        model=policy.model,
        is_adapter=policy.is_adapter,
        tokenizer=tokenizer,
        rows=prepared,
    )
    if recipe.engine == "trl":
        trainer = trl_engine.dpo_trainer(work, reference)
    else:
        trainer = DpoTrainer(**native_settings(work), reference=reference)
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
