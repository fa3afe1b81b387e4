"""From a recipe, prepared prompts and roles to a trainer that is ready to train."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from chatalign.data import Kind
from chatalign.engine.ppo_collect import Collector, Play
from chatalign.engine.ppo_roles import Roles
from chatalign.engine.ppo_schedule import Schedule
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.engine.stage import argument_values
from chatalign.errors import RecipeError
from chatalign.recipe import DataSection, PpoRecipe
from chatalign.rollout import Sampling, TransformersRollout
from chatalign.runs import Run


def build_trainer(
    *,
    recipe: PpoRecipe,
    run: Run,
    roles: Roles,
    tokenizer: Any,
    prompt_rows: Any,
    eval_rows: Any | None,
    ptx_rows: Any | None,
    stop_ids: list[int],
) -> PpoTrainer:
    """The trainer with its schedule, sampler and arguments; raises RecipeError where they contradict each other."""
    _refuse_long(recipe, roles, prompt_rows)
    plain = argument_values(recipe, run, is_adapter=roles.policy.is_adapter)
    # The steps are known once the number of processes is, which TrainingArguments finds out.
    args = TrainingArguments(**plain)
    schedule = Schedule.of(recipe, prompts=len(prompt_rows), rank=args.process_index, world_size=args.world_size)
    args.max_steps = schedule.steps
    args.gradient_accumulation_steps = schedule.micro_batches
    args.ignore_data_skip = True  # the position is the trainer's own; transformers would replay every rollout
    section = recipe.ppo
    sampling = Sampling(
        max_new_tokens=section.response_length,
        min_new_tokens=section.min_response_length,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        stop_token_ids=tuple(stop_ids),
        forbidden_token_ids=roles.forbidden,
        seed=schedule.seed,
    )
    assert roles.policy.reference is not None
    collector = Collector(
        model=roles.model,
        reference=roles.policy.reference,
        rewards=roles.rewards,
        engine=TransformersRollout(
            roles.policy.model, tokenizer.pad_token_id, batch_size=section.local_rollout_forward_batch_size
        ),
        tokenizer=tokenizer,
        batch_size=section.local_rollout_forward_batch_size,
        own_logps=args.bf16 or _low_precision(recipe, roles) or roles.model.shares_trunk,
    )
    return PpoTrainer(
        play=Play(collector=collector, sampling=sampling, schedule=schedule, ptx_rows=ptx_rows),
        recipe=recipe,
        run=run,
        args=args,
        model=roles.model,
        tokenizer=tokenizer,
        train_rows=prompt_rows,
        eval_rows=eval_rows,
    )


def ptx_kind(section: DataSection) -> Kind:
    """``text`` where every source is declared as plain text, else demonstrations."""
    return "text" if all(source.format == "text" for source in section.datasets) else "conversation"


def _low_precision(recipe: PpoRecipe, roles: Roles) -> bool:
    """Whether decoding and the flat forward pass may round differently enough to move the ratio from 1."""
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in roles.policy.model.parameters())
    return half or recipe.train.fp16 or recipe.quantization is not None


def _refuse_long(recipe: PpoRecipe, roles: Roles, prompt_rows: Any) -> None:
    places = getattr(roles.policy.model.config, "max_position_embeddings", None)
    longest = max(map(len, prompt_rows["prompt_ids"]))
    if places is not None and longest + recipe.ppo.response_length > places:
        raise RecipeError(
            f"a prompt of {longest} tokens and `ppo.response_length: {recipe.ppo.response_length}` need more than the "
            f"model's {places} positions; set `data.max_prompt_length` to {places - recipe.ppo.response_length} or less"
        )
