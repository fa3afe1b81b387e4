"""Who plays what in PPO, and on which weights: policy, reference, value and rewards, on as few backbones as can be.

With LoRA all four are adapters of one backbone (a frozen one, perhaps in 4 bits) where the reward model was trained
on the same base with the same tokenizer and template. Anything else gets weights of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from chatalign.data.chat import encode_conversation
from chatalign.engine.isolation import computes_in_half, enable_segments
from chatalign.engine.loss_head import enable_chunked_head
from chatalign.engine.ppo_critic import with_value
from chatalign.engine.ppo_model import PpoModel, backbone, forbid_tokens
from chatalign.engine.ppo_rewards import (
    FunctionScorer,
    ModelScorer,
    Replies,
    Rewards,
    RewardSource,
    Term,
    stored_normaliser,
)
from chatalign.errors import ModelError
from chatalign.models.adapters import Policy, attach_adapter, read_adapter, read_lora_config
from chatalign.models.heads import SCORE, ScoreHead, active_head, load_reward_model, stored_probe
from chatalign.models.load import base_ref_of
from chatalign.models.resolve import Resolved, resolve
from chatalign.models.score_guard import probe_ids, refuse_drift, scale_of
from chatalign.models.tokenizer import load_tokenizer
from chatalign.recipe import ModelSection, PpoRecipe

_log = logging.getLogger("chatalign")


@dataclass(frozen=True, kw_only=True)
class Roles:
    """All models of a run."""

    model: PpoModel
    policy: Policy
    rewards: Rewards
    forbidden: tuple[int, ...]


def build_roles(recipe: PpoRecipe, policy: Policy, tokenizer: Any, stop_ids: Sequence[int]) -> Roles:
    """Load the rewards, give the value function its weights, and forbid the tokens that no reply may hold.

    Raises ModelError or RecipeError where a reward model or a function can't be used.
    """
    enable_segments(policy.model, recipe.model.attention)
    sources = [_source(name, weight, section, policy, tokenizer) for name, weight, section in _named_models(recipe)]
    rewards = _rewards(recipe, sources, policy)
    model = with_value(recipe, policy, tokenizer, sources, rewards)
    forbidden = tuple(sorted(set(tokenizer.all_special_ids) - set(stop_ids)))
    reference = policy.reference.module if policy.reference is not None else None
    for each in (policy.model, *([reference] if reference is not None else [])):
        if not forbid_tokens(each, forbidden):
            forbidden = ()
        enable_segments(each, recipe.model.attention)
        enable_chunked_head(each)
    return Roles(model=model, policy=policy, rewards=rewards, forbidden=forbidden)


def _named_models(recipe: PpoRecipe) -> list[tuple[str, float, ModelSection]]:
    named = [("model", 1.0, recipe.reward_model)] if recipe.reward_model is not None else []
    for i, reward in enumerate(recipe.ppo.rewards):
        if reward.model:
            named.append((f"model_{i}", reward.weight, ModelSection(name_or_path=reward.model)))
    return named


def _source(name: str, weight: float, section: ModelSection, policy: Policy, tokenizer: Any) -> RewardSource:
    resolved = resolve(section.name_or_path or "", revision=section.revision)
    own_tokenizer = load_tokenizer(section)
    same_text = (
        own_tokenizer.get_vocab() == tokenizer.get_vocab() and own_tokenizer.chat_template == tokenizer.chat_template
    )
    on_backbone = policy.is_adapter and same_text and resolved.kind == "reward_adapter" and _same_base(resolved, policy)
    if not own_tokenizer.chat_template and not same_text:
        raise ModelError(
            f"{section.name_or_path}: has another tokenizer than the policy and no chat template to read its replies "
            f"with; set `chat_template_path` in its section"
        )
    return RewardSource(
        name=name,
        weight=weight,
        section=section,
        resolved=resolved,
        tokenizer=own_tokenizer,
        same_text=same_text,
        on_backbone=on_backbone,
    )


def _same_base(resolved: Resolved, policy: Policy) -> bool:
    """Whether an adapter can hang on the policy's base: the same weights, and nothing saved whole but its head."""
    assert resolved.adapter is not None
    if set(read_lora_config(resolved.adapter).modules_to_save or []) - {SCORE, "classifier"}:
        return False
    theirs, ours = base_ref_of(resolved), policy.base_ref
    if theirs.sha256 is not None and ours.sha256 is not None:
        return theirs.sha256 == ours.sha256
    return (theirs.name_or_path, theirs.revision) == (ours.name_or_path, ours.revision)


def _rewards(recipe: PpoRecipe, sources: Sequence[RewardSource], policy: Policy) -> Rewards:
    terms = [_model_term(recipe, source, policy) for source in sources]
    for reward in recipe.ppo.rewards:
        if reward.function:
            name = reward.function.rpartition(":")[2]
            terms.append(Term(name=name, weight=reward.weight, scorer=FunctionScorer(reward.function)))
    names = [term.name for term in terms]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ModelError(f"`ppo.rewards` has two terms named {sorted(twice)}; rename one of the functions")
    return Rewards(terms)


def _model_term(recipe: PpoRecipe, source: RewardSource, policy: Policy) -> Term:
    batch_size = recipe.ppo.local_rollout_forward_batch_size
    scorer: ModelScorer
    if source.on_backbone:
        assert source.resolved.adapter is not None
        # Not the bare name: peft takes ".NAME" out of weights' names, and "model" is in all of them.
        adapter = f"reward_{source.name}"
        attach_adapter(policy.model, source.resolved.adapter, adapter, trainable=False, heads=False)
        head = ScoreHead(_hidden_size(policy.model)).requires_grad_(False)
        head.load_state_dict({"weight": _score_weight(source.resolved.adapter)})
        scorer = ModelScorer(policy.model, head, batch_size=batch_size, adapter=adapter)
        _refuse_drift(source, scorer)
    else:
        loaded = load_reward_model(source.section, source.tokenizer, quantization=recipe.quantization).model
        enable_segments(loaded, source.section.attention)
        retokenize = None if source.same_text else _retokenizer(source.tokenizer)
        scorer = ModelScorer(loaded, active_head(loaded), batch_size=batch_size, retokenize=retokenize)
    stored = recipe.ppo.normalize_reward is True
    normaliser = stored_normaliser(source.resolved, scorer.model.config) if stored else None
    return Term(name=source.name, weight=source.weight, scorer=scorer, normaliser=normaliser)


def _refuse_drift(source: RewardSource, scorer: ModelScorer) -> None:
    """Raise GuardError where a reward adapter on the policy's backbone scores its probe otherwise than when saved."""
    if not (stored := stored_probe(source.resolved, None)):
        return
    scorer.head.to(scorer.model.get_input_embeddings().weight.device)
    ids = probe_ids(source.tokenizer).tolist()
    count = len(ids)
    probe = Replies(
        prompt_ids=[row[:1] for row in ids],
        response_ids=[row[1:] for row in ids],
        prompts=[[] for _ in range(count)],
        texts=[""] * count,
        extras=[{} for _ in range(count)],
    )
    found = scale_of(scorer(probe), half=computes_in_half(scorer.model))
    refuse_drift(stored, found, source.resolved.source)


def _retokenizer(tokenizer: Any) -> Callable[[list[dict[str, Any]], str], list[int]]:
    def retokenize(prompt: list[dict[str, Any]], reply: str) -> list[int]:
        messages = [*prompt, {"role": "assistant", "content": reply}]
        encoded = encode_conversation(messages, tokenizer, supervise="last_assistant", first_supervised=len(prompt))
        # Through the stop token, where the model learned to read its score; not the template's line break after it.
        return encoded.ids[: encoded.spans[-1][1]]

    return retokenize


def _score_weight(folder: Path) -> Tensor:
    found = [tensor for name, tensor in read_adapter(folder).items() if name.endswith(f"{SCORE}.weight")]
    if len(found) != 1:
        raise ModelError(f"{folder}: holds {len(found)} `score` weights, not one; train it again (chatalign reward)")
    return found[0].float()


def _hidden_size(model: nn.Module) -> int:
    return int(backbone(model).config.hidden_size)
