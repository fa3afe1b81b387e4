"""Reward modelling from preference pairs: ``chatalign reward RECIPE`` or ``accelerate launch -m chatalign.reward``.

The mean and deviation of the finished model's scores on training pairs are stored with it, so that PPO can bring
rewards to one scale (Ouyang et al., 2203.02155, step 2; Huang et al., 2403.17031).
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that follows is imported: a wrong recipe is refused without it
    from chatalign.launch import stage_main

    stage_main("reward")

from chatalign.artifact import Artifact
from chatalign.data import prepare
from chatalign.data.collate import collate_pairs
from chatalign.engine import trl_engine
from chatalign.engine.reward_trainer import RewardTrainer, measure_scores
from chatalign.engine.stage import Work, finish, last_means, native_settings, train
from chatalign.models.heads import new_reward_model
from chatalign.models.tokenizer import load_tokenizer
from chatalign.phases import phase
from chatalign.recipe import RewardRecipe
from chatalign.runs import open_run


def run(recipe: RewardRecipe) -> Artifact:
    """Train the recipe's reward model and save it; raises a ChatalignError where it can't be done."""
    opened = open_run(recipe)
    with phase("data"):
        tokenizer = load_tokenizer(recipe.model, chat=recipe.data.apply_chat_template)
        prepared = prepare(recipe.data, tokenizer, "preference", seed=recipe.train.seed)
    with phase("model"):
        scorer = new_reward_model(recipe, tokenizer)
    work = Work(
        recipe=recipe,
        run=opened,
        model=scorer.model,
        is_adapter=scorer.is_adapter,
        tokenizer=tokenizer,
        rows=prepared,
    )
    if recipe.engine == "trl":
        trainer = trl_engine.reward_trainer(work)
    else:
        trainer = RewardTrainer(**native_settings(work), collate=collate_pairs)
    wall_s = train(trainer, opened)
    with phase("score"):
        measured = measure_scores(trainer, prepared.train)
    return finish(
        run=opened,
        recipe=recipe,
        trainer=trainer,
        tokenizer=tokenizer,
        data=prepared.used,
        base_ref=scorer.base_ref,
        kind="reward_adapter" if scorer.is_adapter else "reward_model",
        metrics=last_means(trainer),
        extra=measured,
        wall_s=wall_s,
    )
