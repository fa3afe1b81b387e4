"""What PPO pays for: reward models and Python functions, weighted and summed.

Shapes: B replies.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chatalign.data.collate import collate_sequences
from chatalign.engine.batching import to_device
from chatalign.engine.ppo_model import backbone, hidden_states
from chatalign.errors import DataError, NonFiniteError, RecipeError
from chatalign.maths import ScoreNormaliser
from chatalign.models.reference import adapter_in_use
from chatalign.models.resolve import Resolved
from chatalign.recipe import ModelSection

RewardCallable = Callable[..., Sequence[float]]
NORMALISER = "normaliser"  # where the reward stage keeps its scores' mean and deviation in `artifact.extra`


@dataclass(frozen=True, kw_only=True)
class Replies:
    """Replies as tokens and as text, with the prompts and the other columns of their rows."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    prompts: list[list[dict[str, Any]]]
    texts: list[str]
    extras: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """A reward model of the recipe before it is loaded."""

    name: str
    weight: float
    section: ModelSection
    resolved: Resolved
    tokenizer: Any
    same_text: bool  # the policy's own tokens are what this model was trained on
    on_backbone: bool  # its adapter fits the policy's base


class Scorer(Protocol):
    """One source of reward."""

    def __call__(self, replies: Replies) -> Tensor:
        """One score a reply, (B,) float32 on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True)
class Term:
    """A scorer with its name in the metrics, its weight, and the scale its scores are brought to (or None)."""

    name: str
    weight: float
    scorer: Scorer
    normaliser: ScoreNormaliser | None = None


class Rewards:
    """The weighted sum of all terms."""

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise ValueError("PPO needs at least one reward")
        self.terms = list(terms)

    def to(self, device: torch.device) -> None:
        """Move what reward models there are."""
        for term in self.terms:
            if isinstance(term.scorer, ModelScorer):
                term.scorer.to(device)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The scale of each term that has one."""
        return {term.name: term.normaliser.state_dict() for term in self.terms if term.normaliser is not None}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take `state_dict` back, in place."""
        for place, term in enumerate(self.terms):
            if term.name in state:
                normaliser = ScoreNormaliser()
                normaliser.load_state_dict(state[term.name])
                self.terms[place] = replace(term, normaliser=normaliser)

    def __call__(self, replies: Replies) -> tuple[Tensor, dict[str, Tensor]]:
        """Total (B,), and each term by name as its source gave it (B,), unweighted and unnormalised.

        Raises NonFiniteError where a score is NaN or infinite.
        """
        total = torch.zeros(len(replies))
        raw: dict[str, Tensor] = {}
        for term in self.terms:
            scores = term.scorer(replies)
            if not bool(scores.isfinite().all()):
                row = int((~scores.isfinite()).nonzero()[0])
                raise NonFiniteError(
                    f"reward `{term.name}` gave {float(scores[row])} for the reply {replies.texts[row]!r}"
                )
            raw[term.name] = scores
            total += term.weight * (term.normaliser.normalise(scores) if term.normaliser else scores)
        return total, raw


class ModelScorer:
    """A reward model: a backbone and a score head, read at the last token of each reply.

    `adapter` names the backbone's adapter to score with, where the reward shares the policy's. `retokenize` turns a
    conversation into the model's own tokens, where its tokenizer or template isn't the policy's.
    """

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        *,
        batch_size: int,
        adapter: str | None = None,
        retokenize: Callable[[list[dict[str, Any]], str], list[int]] | None = None,
    ) -> None:
        self.model = model
        self.head = head
        self.batch_size = batch_size
        self.adapter = adapter
        self.retokenize = retokenize

    def __call__(self, replies: Replies) -> Tensor:
        """Scores (B,), float32."""
        sequences = self._sequences(replies)
        # Sorted by length, so that equal lengths meet in a batch; undone below.
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        scores = torch.empty(len(sequences))
        with torch.no_grad(), self._weights():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                scores[rows] = self._score([sequences[row] for row in rows])
        return scores

    def to(self, device: torch.device) -> None:
        """Move the head, and the model where it isn't the policy's own or placed already (a quantized one)."""
        self.head.to(device)
        if self.adapter is None and not getattr(self.model, "is_quantized", False):
            self.model.to(device)

    def _sequences(self, replies: Replies) -> list[list[int]]:
        if self.retokenize is None:
            return [[*p, *r] for p, r in zip(replies.prompt_ids, replies.response_ids, strict=True)]
        return [self.retokenize(prompt, text) for prompt, text in zip(replies.prompts, replies.texts, strict=True)]

    def _score(self, sequences: Sequence[list[int]]) -> Tensor:
        weight = next(self.head.parameters())
        batch = collate_sequences([ids[:1] for ids in sequences], [ids[1:] for ids in sequences])
        last = batch["segments"][:, 1].long() - 1
        hidden = hidden_states(backbone(self.model), to_device(batch, weight.device), last.to(weight.device))
        scores: Tensor = self.head(hidden)
        return scores.reshape(-1).float().cpu()

    @contextmanager
    def _weights(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            if self.adapter is None:
                yield
            else:
                with adapter_in_use(self.model, self.adapter):
                    yield
        finally:
            self.model.train(training)


class FunctionScorer:
    """A Python function ``f(*, prompts, replies, extras) -> list of floats``, from ``path/to/file.py:name``.

    ``prompts`` are lists of messages, ``replies`` texts without special tokens, ``extras`` the other columns.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference
        self.function = load_function(reference)

    def __call__(self, replies: Replies) -> Tensor:
        """Scores (B,). Raises DataError where the function gives another number of scores, or no numbers."""
        scores = self.function(prompts=replies.prompts, replies=replies.texts, extras=replies.extras)
        try:
            numbers = [float(score) for score in scores]
        except (TypeError, ValueError):
            raise DataError(f"{self.reference}: gave {type(scores).__name__}, not a list of numbers") from None
        if len(numbers) != len(replies):
            raise DataError(f"{self.reference}: gave {len(numbers)} scores for {len(replies)} replies; give one each")
        # NaN would reach the policy's gradient: Rewards refuses it, naming the reply.
        return torch.tensor([score if math.isfinite(score) else math.nan for score in numbers])


def load_function(reference: str) -> RewardCallable:
    """The function that ``path/to/file.py:name`` names; raises RecipeError where file or name is missing."""
    path_text, _, name = reference.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise RecipeError(f"`{reference}`: {path_text} is no file; give path/to/file.py:name")
    spec = importlib.util.spec_from_file_location(f"chatalign_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"`{reference}`: {path_text} is no Python file; give path/to/file.py:name")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"`{reference}`: {path_text} has no function `{name}`")
    return function


def stored_normaliser(resolved: Resolved, config: Any) -> ScoreNormaliser | None:
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
