"""PPO on a reward model or Python rewards: ``chatalign ppo RECIPE`` or ``accelerate launch -m chatalign.ppo RECIPE``.

The policy answers prompts, the replies are scored, and the policy moves towards what scored better than its value
function expected, held near the model it started from (Ouyang et al., 2203.02155, step 3). See docs/ppo.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that follows is imported: a wrong recipe is refused without it
    from chatalign.launch import stage_main

    stage_main("ppo")

from chatalign.artifact import Artifact
from chatalign.data import prepare
from chatalign.engine.ppo_roles import build_roles
from chatalign.engine.ppo_setup import build_trainer, ptx_kind
from chatalign.engine.stage import finish, last_means, train
from chatalign.models.adapters import load_policy
from chatalign.models.tokenizer import load_tokenizer, stop_token_ids
from chatalign.phases import phase
from chatalign.recipe import PpoRecipe
from chatalign.runs import open_run


def run(recipe: PpoRecipe) -> Artifact:
    """Train the recipe's policy by PPO and save it; raises a ChatalignError where it can't be done."""
    opened = open_run(recipe)
    seed = recipe.train.seed
    with phase("data"):
        tokenizer = load_tokenizer(recipe.model, chat=recipe.data.apply_chat_template)
        prepared = prepare(recipe.data, tokenizer, "prompt", seed=seed)
        ptx = prepare(recipe.ptx_data, tokenizer, ptx_kind(recipe.ptx_data), seed=seed) if recipe.ptx_data else None
    with phase("model"):
        policy = load_policy(recipe, tokenizer)
        stop_ids = stop_token_ids(tokenizer, policy.model.generation_config)
        roles = build_roles(recipe, policy, tokenizer, stop_ids)
    trainer = build_trainer(
        recipe=recipe,
        run=opened,
        roles=roles,
        tokenizer=tokenizer,
        prompt_rows=prepared.train,
        eval_rows=prepared.eval,
        ptx_rows=ptx.train if ptx else None,
        stop_ids=stop_ids,
    )
    wall_s = train(trainer, opened)
    trainer.release_policy()
    return finish(
        run=opened,
        recipe=recipe,
        trainer=trainer,
        tokenizer=tokenizer,
        data=prepared.used + (ptx.used if ptx else []),
        base_ref=policy.base_ref,
        kind="adapter" if policy.is_adapter else "model",
        metrics=last_means(trainer),
        extra={"kl_coef": trainer.kl_controller.coef, "skipped_steps": trainer.skipped},
        wall_s=wall_s,
    )
