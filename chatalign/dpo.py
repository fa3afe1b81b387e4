"""Direct preference optimisation: ``chatalign dpo RECIPE`` or ``accelerate launch -m chatalign.dpo RECIPE``.

The reference is the model that the run starts from, whatever form it has (a merged model, an SFT adapter), which is
checked before the first update (Rafailov et al., 2305.18290).
"""

from __future__ import annotations

from chatalign.artifact import Artifact
from chatalign.data import prepare
from chatalign.engine.dpo_trainer import DpoTrainer
from chatalign.engine.stage import finish, last_means, train, training_arguments
from chatalign.errors import ModelError
from chatalign.models.adapters import load_policy
from chatalign.models.tokenizer import load_tokenizer
from chatalign.recipe import DpoRecipe
from chatalign.runs import open_run


def run(recipe: DpoRecipe) -> Artifact:
    """Train the recipe's policy on preference pairs and save it; raises a ChatalignError where it can't be done."""
    opened = open_run(recipe)
    tokenizer = load_tokenizer(recipe.model, chat=recipe.data.apply_chat_template)
    prepared = prepare(recipe.data, tokenizer, "preference", seed=recipe.train.seed)
    policy = load_policy(recipe, tokenizer)
    if policy.reference is None:
        raise ModelError("`model.config` makes a model from nothing, and DPO needs one that SFT ended with")
    trainer = DpoTrainer(
        recipe=recipe,
        run=opened,
        args=training_arguments(recipe, opened, is_adapter=policy.is_adapter),
        model=policy.model,
        tokenizer=tokenizer,
        train_rows=prepared.train,
        eval_rows=prepared.eval,
        reference=policy.reference,
    )
    wall_s = train(trainer, opened)
    trainer.refuse_moved_reference()
    return finish(
        run=opened,
        recipe=recipe,
        trainer=trainer,
        tokenizer=tokenizer,
        data=prepared.used,
        base_ref=policy.base_ref,
        kind="adapter" if policy.is_adapter else "model",
        metrics=last_means(trainer),
        extra={"reference": policy.reference.way, "reference_sha256": trainer.reference_sha256},
        wall_s=wall_s,
    )


def main() -> None:
    """``python -m chatalign.dpo RECIPE [key=value ...]``."""
    from chatalign.launch import stage_main

    stage_main("dpo", run)


if __name__ == "__main__":
    main()
