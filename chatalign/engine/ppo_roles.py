"""Who plays what in PPO, and on which weights: policy, reference, value and rewards, on as few backbones as can be.

With LoRA all four are adapters of one backbone (a frozen one, perhaps in 4 bits) where the reward model was trained
on the same base with the same tokenizer and template. Anything else gets weights of its own.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatalign.data.chat import encode_conversation
from chatalign.engine.isolation import enable_segments
from chatalign.engine.loss_head import enable_chunked_head
from chatalign.engine.ppo_model import PpoModel, ValueHead, backbone, forbid_tokens
from chatalign.engine.ppo_rewards import FunctionScorer, ModelScorer, Rewards, Term
from chatalign.errors import ModelError
from chatalign.maths import ScoreNormaliser
from chatalign.models.adapters import DEFAULT, Policy, attach_adapter, read_adapter, read_lora_config
from chatalign.models.heads import SCORE, ScoreHead, active_head, load_reward_model
from chatalign.models.load import base_ref_of
from chatalign.models.resolve import Resolved, resolve
from chatalign.models.tokenizer import load_tokenizer
from chatalign.recipe import ModelSection, PpoRecipe

VALUE = "value"
NORMALISER = "normaliser"  # where the reward stage keeps its scores' mean and deviation in `artifact.extra`
_log = logging.getLogger("chatalign")


@dataclass(frozen=True, kw_only=True)
class _RewardSource:
    """A reward model of the recipe before it is loaded."""

    name: str
    weight: float
    section: ModelSection
    resolved: Resolved
    tokenizer: Any
    same_text: bool  # the policy's own tokens are what this model was trained on
    on_backbone: bool  # its adapter fits the policy's base


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
    model = _with_value(recipe, policy, sources, rewards)
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


def _source(name: str, weight: float, section: ModelSection, policy: Policy, tokenizer: Any) -> _RewardSource:
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
    return _RewardSource(
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


def _rewards(recipe: PpoRecipe, sources: Sequence[_RewardSource], policy: Policy) -> Rewards:
    terms = [_model_term(recipe, source, policy) for source in sources]
    for reward in recipe.ppo.rewards:
        if reward.function:
            name = reward.function.rpartition(":")[2]
            terms.append(Term(name=name, weight=reward.weight, scorer=FunctionScorer(reward.function)))
    names = [term.name for term in terms]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ModelError(f"`ppo.rewards` has two terms named {sorted(twice)}; rename one of the functions")
    return Rewards(terms)


def _model_term(recipe: PpoRecipe, source: _RewardSource, policy: Policy) -> Term:
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
    else:
        loaded = load_reward_model(source.section, source.tokenizer, quantization=recipe.quantization).model
        enable_segments(loaded, source.section.attention)
        retokenize = None if source.same_text else _retokenizer(source.tokenizer)
        scorer = ModelScorer(loaded, active_head(loaded), batch_size=batch_size, retokenize=retokenize)
    normaliser = _normaliser(source.resolved, scorer.model.config) if recipe.ppo.normalize_reward else None
    return Term(name=source.name, weight=source.weight, scorer=scorer, normaliser=normaliser)


def _normaliser(resolved: Resolved, config: Any) -> ScoreNormaliser | None:
    """The scale of the reward model's scores: from its run, or from the configuration that is published with it."""
    stored = resolved.artifact.extra.get(NORMALISER) if resolved.artifact is not None else None
    if stored:
        normaliser = ScoreNormaliser()
        normaliser.load_state_dict(stored)
        return normaliser
    mean, std = getattr(config, "score_mean", None), getattr(config, "score_std", None)
    if mean is None or std is None:
        return None
    return ScoreNormaliser(count=1, mean=float(mean), sum_of_squared_deviations=float(std) ** 2)


def _retokenizer(tokenizer: Any) -> Callable[[list[dict[str, Any]], str], list[int]]:
    def retokenize(prompt: list[dict[str, Any]], reply: str) -> list[int]:
        messages = [*prompt, {"role": "assistant", "content": reply}]
        encoded = encode_conversation(messages, tokenizer, supervise="last_assistant", first_supervised=len(prompt))
        # Through the stop token, where the model learned to read its score; not the template's line break after it.
        return encoded.ids[: encoded.spans[-1][1]]

    return retokenize


def _with_value(recipe: PpoRecipe, policy: Policy, sources: Sequence[_RewardSource], rewards: Rewards) -> PpoModel:
    """The module that is trained. A value function that can't start from a reward model starts from the policy."""
    head = ValueHead(_hidden_size(policy.model))
    trunk, adapter = None, None
    if recipe.ppo.value == "separate":
        start = _value_start(recipe, policy, sources)
        if policy.is_adapter:
            adapter = VALUE
            _add_value_adapter(policy, recipe, start)
        else:
            trunk = _value_trunk(policy, rewards, start)
        if start is not None:
            _head_from_reward(head, rewards, start)
    return PpoModel(
        policy.model,
        head,
        temperature=recipe.ppo.temperature,
        entropy_grad=recipe.ppo.entropy_coef > 0,
        value_trunk=trunk,
        value_adapter=adapter,
    )


def _value_start(recipe: PpoRecipe, policy: Policy, sources: Sequence[_RewardSource]) -> _RewardSource | None:
    """The reward model that the value function starts from, or None: from the policy, with V = 0."""
    if recipe.ppo.value_init != "reward":
        return None
    for source in sources:
        if source.on_backbone or (not policy.is_adapter and source.same_text and _same_shape(source, policy)):
            return source
    _log.info("no reward model shares the policy's base: the value function starts from the policy, at V = 0")
    return None


def _same_shape(source: _RewardSource, policy: Policy) -> bool:
    """Whether a full reward model's backbone has the policy's architecture."""
    from transformers import AutoConfig

    if source.resolved.adapter is not None:
        return False
    theirs = AutoConfig.from_pretrained(source.resolved.base, revision=source.resolved.revision)
    ours = policy.model.config
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
    return all(getattr(theirs, key, None) == getattr(ours, key, None) for key in keys)


def _add_value_adapter(policy: Policy, recipe: PpoRecipe, start: _RewardSource | None) -> None:
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


def _value_trunk(policy: Policy, rewards: Rewards, start: _RewardSource | None) -> Any:
    origin = policy.model
    if start is not None:
        scorer = next(term.scorer for term in rewards.terms if term.name == start.name)
        assert isinstance(scorer, ModelScorer)
        origin = scorer.model
    return copy.deepcopy(backbone(origin)).float().requires_grad_(True)


def _head_from_reward(head: ValueHead, rewards: Rewards, start: _RewardSource) -> None:
    """The score head as a value head, in the units that the policy is paid in: weight · (score − mean) / std."""
    term = next(term for term in rewards.terms if term.name == start.name)
    assert isinstance(term.scorer, ModelScorer)
    score_weight: Tensor = term.scorer.head.weight  # type: ignore[assignment]
    scale, mean = (term.normaliser.std, term.normaliser.mean) if term.normaliser is not None else (1.0, 0.0)
    with torch.no_grad():
        head.weight.copy_(score_weight.detach().float() * (term.weight / scale))
        head.bias.fill_(-mean * term.weight / scale)


def _score_weight(folder: Path) -> Tensor:
    found = [tensor for name, tensor in read_adapter(folder).items() if name.endswith(f"{SCORE}.weight")]
    if len(found) != 1:
        raise ModelError(f"{folder}: holds {len(found)} `score` weights, not one; train it again (chatalign reward)")
    return found[0].float()


def _hidden_size(model: nn.Module) -> int:
    return int(backbone(model).config.hidden_size)
