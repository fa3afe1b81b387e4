"""Learning rates where a recipe gives none. LoRA's are about 10 × full fine-tuning's ("LoRA Without Regret", 2025)."""

from __future__ import annotations

from chatalign.recipe import StageRecipe

# (full, LoRA), each with where it comes from.
LEARNING_RATES: dict[str, tuple[float, float]] = {
    "pretrain": (1e-3, 1e-3),  # nanoGPT's baby networks
    "sft": (2e-5, 2e-4),  # alignment-handbook zephyr-7b-sft-full; QLoRA (2305.14314) table 9
    "reward": (9e-6, 1e-4),  # InstructGPT (2203.02155) appendix C.2; trl's reward_modeling.py example
    "dpo": (5e-7, 5e-6),  # alignment-handbook zephyr-7b-dpo-full, dpo-qlora
    "kto": (5e-7, 5e-6),  # as DPO (TRL docs, KTO: 5e-7 to 5e-6)
    "ppo": (3e-6, 1e-5),  # N+ implementation details (2403.17031); trl's stack_llama example (1.4e-5)
}


def learning_rate(recipe: StageRecipe, *, is_adapter: bool) -> float:
    """The recipe's learning rate, or its stage's published default for full or adapter training."""
    if recipe.train.learning_rate is not None:
        return recipe.train.learning_rate
    full, lora = LEARNING_RATES[recipe.stage]
    return lora if is_adapter else full
