"""What generation is asked for and what it gives back, whoever generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn.

    ``temperature`` 0 is greedy. ``stop_token_ids`` end a reply and stay in it. ``forbidden_token_ids`` have
    probability 0 in the sampler and must have it in whoever recomputes log-probabilities (pad, BOS, role tokens).
    ``top_p``, ``top_k`` (0: off) and ``min_new_tokens`` shape the draw alone, not the log-probabilities.
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 0
    forbidden_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}: "
                "0 <= min <= max and max >= 1 must hold"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}: "
                "temperature and top_k must not be negative, and top_p lies above 0 and up to 1"
            )
        if both := set(self.stop_token_ids) & set(self.forbidden_token_ids):
            raise ValueError(f"tokens {sorted(both)} are both stop and forbidden: such a reply could not end")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Replies in the order of their prompts.

    ``logprobs`` are those of softmax(logits / temperature) with forbidden tokens taken out, in nats, *before*
    top-p, top-k and the minimum length: what a trainer recomputes, so that the ratio starts at 1. At temperature 0
    they are those of temperature 1. vLLM's are *after* top-p, top-k and the minimum length, and not quite the
    trainer's: see `chatalign.maths.importance_weights`. ``ended`` says which replies end in a stop token rather than
    at the limit.
    """

    response_ids: list[list[int]]
    logprobs: list[list[float]]
    ended: list[bool]


class RolloutEngine(Protocol):
    """Anything that answers a list of tokenized prompts."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, *, row_seeds: Sequence[int] | None = None
    ) -> Rollout:
        """One reply a prompt, in the prompts' order.

        A row's randomness comes from ``sampling.seed`` and its entry of `row_seeds` (its place in the list where
        that is None), so the reply depends neither on the other rows nor on how they are batched.
        """
        ...
