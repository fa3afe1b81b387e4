"""From a recipe, prepared prompts and roles to a trainer that is ready to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from chatalign.rollout import (
    RolloutEngine,
    Sampling,
    TransformersRollout,
    VllmClient,
    VllmColocateRollout,
    VllmServerRollout,
    VllmSettings,
)
from chatalign.rollout.vllm_adapter import ADAPTER, refuse_unserved
from chatalign.runs import Run, world_size


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
    longest = _longest(recipe, roles, [rows for rows in (prompt_rows, eval_rows) if rows is not None])
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
    is_vllm = section.rollout_engine != "transformers"
    correct = is_vllm and section.vllm_importance_sampling_correction
    full_precision = not (args.bf16 or _low_precision(recipe, roles))
    collector = Collector(
        model=roles.model,
        reference=roles.policy.reference,
        rewards=roles.rewards,
        engine=_ENGINES[section.rollout_engine](
            _Parts(recipe=recipe, run=run, roles=roles, tokenizer=tokenizer, longest=longest, bf16=args.bf16)
        ),
        tokenizer=tokenizer,
        batch_size=section.local_rollout_forward_batch_size,
        own_logps=is_vllm or not full_precision or roles.model.shares_trunk,
        full_precision=full_precision,
        other_sampler=is_vllm,
        importance_cap=section.vllm_importance_sampling_clip_max if correct else None,
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


def _longest(recipe: PpoRecipe, roles: Roles, prompt_rows: Sequence[Any]) -> int:
    """Tokens of the longest prompt and its reply; RecipeError where the model hasn't as many positions."""
    places = getattr(roles.policy.model.config, "max_position_embeddings", None)
    longest = max(len(ids) for rows in prompt_rows for ids in rows["prompt_ids"])
    if places is not None and longest + recipe.ppo.response_length > places:
        raise RecipeError(
            f"a prompt of {longest} tokens and `ppo.response_length: {recipe.ppo.response_length}` need more than the "
            f"model's {places} positions; set `data.max_prompt_length` to {places - recipe.ppo.response_length} or less"
        )
    return longest + recipe.ppo.response_length


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What engines are made of; `longest` counts the tokens of the longest prompt and its reply."""

    recipe: PpoRecipe
    run: Run
    roles: Roles
    tokenizer: Any
    longest: int
    bf16: bool


def _transformers(parts: _Parts) -> RolloutEngine:
    batch_size = parts.recipe.ppo.local_rollout_forward_batch_size
    return TransformersRollout(parts.roles.policy.model, parts.tokenizer.pad_token_id, batch_size=batch_size)


def _vllm_server(parts: _Parts) -> RolloutEngine:
    section, policy = parts.recipe.ppo, parts.roles.policy
    if not policy.is_adapter:
        raise RecipeError(
            "`ppo.rollout_engine: vllm_server` hands the server adapters, and this recipe trains all weights; add a "
            "`lora` section, or set `ppo.rollout_engine: vllm_colocate`"
        )
    refuse_unserved(policy.model.peft_config[ADAPTER])
    url = section.vllm_server_base_url or f"http://{section.vllm_server_host}:{section.vllm_server_port}"
    return VllmServerRollout(
        policy.model,
        VllmClient(url, timeout_s=section.vllm_server_timeout),
        folder=parts.run.folder,
        vocabulary=policy.model.get_input_embeddings().num_embeddings,
        longest=parts.longest,
    )


def _vllm_colocate(parts: _Parts) -> RolloutEngine:
    section, policy = parts.recipe.ppo, parts.roles.policy
    if parts.recipe.quantization is not None:
        raise RecipeError(
            "`ppo.rollout_engine: vllm_colocate` and `quantization` don't go together: vLLM would hold the base whole; "
            "set `ppo.rollout_engine: vllm_server` and start the server with --quantization bitsandbytes"
        )
    if policy.is_adapter:
        refuse_unserved(policy.model.peft_config[ADAPTER])
    settings = VllmSettings(
        model=policy.base_ref.name_or_path,
        revision=policy.base_ref.revision,
        dtype=_vllm_dtype(parts),
        max_model_len=section.vllm_max_model_length or parts.longest,
        gpu_memory_utilization=section.vllm_gpu_memory_utilization,
        tensor_parallel_size=section.vllm_tensor_parallel_size,
        enable_sleep_mode=section.vllm_enable_sleep_mode,
        seed=parts.recipe.train.seed,
    )
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    return VllmColocateRollout(policy.model, settings, vocabulary=vocabulary, processes=world_size())


def _vllm_dtype(parts: _Parts) -> str:
    """The precision in which the trainer multiplies, and bf16 for adapters: vLLM's kernels have none in float32."""
    if parts.recipe.train.fp16:
        return "float16"
    if parts.bf16 or parts.roles.policy.is_adapter:
        return "bfloat16"
    return str(parts.roles.policy.model.get_input_embeddings().weight.dtype).removeprefix("torch.")


_ENGINES: dict[str, Callable[[_Parts], RolloutEngine]] = {
    "transformers": _transformers,
    "vllm_server": _vllm_server,
    "vllm_colocate": _vllm_colocate,
}
