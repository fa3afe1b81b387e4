"""PPO's value function: the weights that it has, and what it starts from.

It is a head on the policy's own hidden states, an adapter of its own on the policy's backbone, or a backbone of its
own: that of a policy whose weights all train, or the recipe's ``value_model``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chatalign.engine.isolation import enable_segments
from chatalign.engine.ppo_model import PpoModel, ValueHead, backbone
from chatalign.engine.ppo_rewards import ModelScorer, Rewards, RewardSource, stored_normaliser
from chatalign.errors import ModelError
from chatalign.maths import ScoreNormaliser
from chatalign.models.adapter_checks import refuse_merge_into_quantized
from chatalign.models.adapters import DEFAULT, Policy, attach_adapter, continue_adapter
from chatalign.models.heads import active_head, load_reward_model
from chatalign.models.load import base_ref_of, disable_dropout, fit_tokenizer, load_base
from chatalign.models.resolve import resolve
from chatalign.models.tokenizer import load_tokenizer
from chatalign.recipe import ModelSection, PpoRecipe

VALUE = "value"
_log = logging.getLogger("chatalign")


def with_value(
    recipe: PpoRecipe, policy: Policy, tokenizer: Any, sources: Sequence[RewardSource], rewards: Rewards
) -> PpoModel:
    """The module that is trained: the policy with its value function.

    One that can't start from a reward model starts from the policy, with V = 0. Raises ModelError where the
    recipe's ``value_model`` doesn't read the policy's tokens.
    """
    head = ValueHead(int(backbone(policy.model).config.hidden_size))
    trunk, adapter, origin, starts_as_reward = None, None, None, False
    if recipe.value_model is not None:
        trunk, head, origin = _critic(recipe, recipe.value_model, tokenizer, sources)
        starts_as_reward = bool(head.weight.any())
    elif recipe.ppo.value == "separate":
        start = _value_start(recipe, policy, sources)
        if policy.is_adapter:
            adapter = VALUE
            _add_value_adapter(policy, recipe, start)
        else:
            trunk = _full_trunk(policy, rewards, start)
        if start is not None:
            _head_from_reward(head, rewards, start)
            origin, starts_as_reward = start.name, True
    return PpoModel(
        policy.model,
        head,
        temperature=recipe.ppo.temperature,
        entropy_grad=recipe.ppo.entropy_coef > 0,
        value_trunk=trunk,
        value_adapter=adapter,
        value_origin=origin,
        value_from_zero=not starts_as_reward,
    )


def _critic(
    recipe: PpoRecipe, section: ModelSection, tokenizer: Any, sources: Sequence[RewardSource]
) -> tuple[Any, ValueHead, str | None]:
    """A backbone of its own in float32, all of which trains, its head, and the reward that it gives at first.

    The head is a reward model's score, else V = 0.
    """
    resolved = resolve(section.name_or_path or "", revision=section.revision)
    own = load_tokenizer(section)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{section.name_or_path}: `value_model` reads the policy's tokens, and this model has another vocabulary; "
            f"take one of the policy's family, or leave `value_model` out"
        )
    scale, score_weight = None, None
    if resolved.kind in ("reward_model", "reward_adapter"):
        model = load_reward_model(section, tokenizer).model
        score_weight = active_head(model).get_parameter("weight").detach().clone()
        if recipe.ppo.normalize_reward is True:
            scale = stored_normaliser(resolved, model.config)
    else:
        model = load_base(section, resolved, trainable=True)
        fit_tokenizer(model, tokenizer)
        if resolved.adapter is not None:
            model = continue_adapter(model, resolved.adapter, None, base_ref_of(resolved))
    if resolved.adapter is not None:
        refuse_merge_into_quantized(model.config, resolved)
        model = model.merge_and_unload(safe_merge=True)
    disable_dropout(model)
    enable_segments(model, recipe.model.attention)
    trunk = backbone(model).float().requires_grad_(True)
    head = ValueHead(int(trunk.config.hidden_size))
    if score_weight is None:
        return trunk, head, None
    paid = next((source for source in sources if source.resolved.source == resolved.source), None)
    _head_from_score(head, score_weight, weight=1.0 if paid is None else paid.weight, normaliser=scale)
    return trunk, head, None if paid is None else paid.name


def _value_start(recipe: PpoRecipe, policy: Policy, sources: Sequence[RewardSource]) -> RewardSource | None:
    """The reward model that the value function starts from, or None: from the policy, with V = 0."""
    if recipe.ppo.value_init != "reward":
        return None
    for source in sources:
        if source.on_backbone or (not policy.is_adapter and source.same_text and _same_shape(source, policy)):
            return source
    _log.info("no reward model shares the policy's base: the value function starts from the policy, at V = 0")
    return None


def _same_shape(source: RewardSource, policy: Policy) -> bool:
    """Whether a full reward model's backbone has the policy's architecture."""
    from transformers import AutoConfig

    if source.resolved.adapter is not None:
        return False
    theirs = AutoConfig.from_pretrained(source.resolved.base, revision=source.resolved.revision)
    ours = policy.model.config
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
    return all(getattr(theirs, key, None) == getattr(ours, key, None) for key in keys)


def _add_value_adapter(policy: Policy, recipe: PpoRecipe, start: RewardSource | None) -> None:
    """A trainable adapter beside the policy's: the reward model's weights, else the policy's own starting point."""
    folder = start.resolved.adapter if start is not None else resolve(recipe.model.name_or_path or "").adapter
    if folder is not None:
        attach_adapter(policy.model, folder, VALUE, trainable=True, heads=False)
        return
    config = copy.deepcopy(policy.model.peft_config[DEFAULT])
    config.modules_to_save = None
    flags = [(parameter, parameter.requires_grad) for parameter in policy.model.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(recipe.train.seed)
        policy.model.add_adapter(VALUE, config)
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)
    policy.model.set_requires_grad(VALUE)


def _full_trunk(policy: Policy, rewards: Rewards, start: RewardSource | None) -> Any:
    origin = policy.model
    if start is not None:
        scorer = next(term.scorer for term in rewards.terms if term.name == start.name)
        assert isinstance(scorer, ModelScorer)
        origin = scorer.model
    return copy.deepcopy(backbone(origin)).float().requires_grad_(True)


def _head_from_reward(head: ValueHead, rewards: Rewards, start: RewardSource) -> None:
    """The score head as a value head, in the units that the policy is paid in: weight · (score − mean) / std."""
    term = next(term for term in rewards.terms if term.name == start.name)
    assert isinstance(term.scorer, ModelScorer)
    score_weight: Tensor = term.scorer.head.weight  # type: ignore[assignment]
    _head_from_score(head, score_weight.detach(), weight=term.weight, normaliser=term.normaliser)


def _head_from_score(
    head: ValueHead, score_weight: Tensor, *, weight: float, normaliser: ScoreNormaliser | None
) -> None:
    scale, mean = (normaliser.std, normaliser.mean) if normaliser is not None else (1.0, 0.0)
    with torch.no_grad():
        head.weight.copy_(score_weight.float() * (weight / scale))
        head.bias.fill_(-mean * weight / scale)
