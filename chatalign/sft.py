"""Supervised fine-tuning on demonstrations: ``chatalign sft RECIPE`` or ``accelerate launch -m chatalign.sft RECIPE``.

The loss is taken on the assistant's tokens alone, packed rows do not see one another, and the mean is over all
tokens of an optimizer step (Ouyang et al., 2203.02155, step 1).
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that follows is imported: a wrong recipe is refused without it
    from chatalign.launch import stage_main

    stage_main("sft")

from chatalign.artifact import Artifact
from chatalign.data import prepare
from chatalign.data.collate import collate_lm
from chatalign.engine import trl_engine
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.stage import Work, finish, last_means, native_settings, train
from chatalign.models.adapters import load_policy
from chatalign.models.tokenizer import load_tokenizer
from chatalign.phases import phase
from chatalign.recipe import SftRecipe
from chatalign.runs import open_run


def run(recipe: SftRecipe) -> Artifact:
    """Fine-tune the recipe's model and save it; raises a ChatalignError where it can't be done."""
    opened = open_run(recipe)
    with phase("data"):
        tokenizer = load_tokenizer(recipe.model, chat=recipe.data.apply_chat_template)
        prepared = prepare(recipe.data, tokenizer, "conversation", seed=recipe.train.seed)
    with phase("model"):
        policy = load_policy(recipe, tokenizer)
    work = Work(
        recipe=recipe,
        run=opened,
        model=policy.model,
        is_adapter=policy.is_adapter,
        tokenizer=tokenizer,
        rows=prepared,
    )
    if recipe.engine == "trl":
        trainer = trl_engine.sft_trainer(work)
    else:
        trainer = LmTrainer(**native_settings(work), collate=collate_lm)
    wall_s = train(trainer, opened)
    return finish(
        run=opened,
        recipe=recipe,
        trainer=trainer,
        tokenizer=tokenizer,
        data=prepared.used,
        base_ref=policy.base_ref,
        kind="adapter" if policy.is_adapter else "model",
        metrics=last_means(trainer),
        wall_s=wall_s,
    )
