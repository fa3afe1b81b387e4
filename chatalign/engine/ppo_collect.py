"""One rollout of one process: replies are drawn, scored, and measured under policy, reference and value function.

Shapes: B replies, K response tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chatalign.data.collate import collate_sequences
from chatalign.engine.batching import to_device
from chatalign.engine.loss_head import token_logprobs
from chatalign.engine.ppo_experience import Episodes
from chatalign.engine.ppo_guard import (
    FULL_PRECISION,
    HALF_PRECISION,
    refuse_gap,
    refuse_other_engine,
    refuse_other_reference,
    refuse_wrong_ends,
)
from chatalign.engine.ppo_model import PpoModel
from chatalign.engine.ppo_rewards import Replies, Rewards
from chatalign.engine.ppo_schedule import Schedule
from chatalign.maths import importance_weights
from chatalign.models.reference import Reference
from chatalign.rollout import Rollout, RolloutEngine, Sampling, TransformersRollout
from chatalign.rollout.padding import refuse_padding_that_counts


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A process's episodes, with what the clock and the two log-probabilities say of how they were made."""

    episodes: Episodes
    rollout_s: float
    score_s: float
    logprob_gap: float | None  # mean |trainer − sampler| in nats, where both were computed


class Collector:
    """Draws and measures replies with the weights as they are.

    `own_logps` says that the policy's log-probabilities are computed anew rather than taken from the sampler: at
    low precision (`full_precision` false) the two differ, and the ratio must start at 1; they are held against each
    other. `other_sampler` says that the engine is no part of the trainer; episodes carry truncated importance weights
    where `importance_cap` bounds them.
    """

    def __init__(
        self,
        *,
        model: PpoModel,
        reference: Reference,
        rewards: Rewards,
        engine: RolloutEngine,
        tokenizer: Any,
        batch_size: int,
        own_logps: bool,
        full_precision: bool = True,
        other_sampler: bool = False,
        importance_cap: float | None = None,
    ) -> None:
        if other_sampler and not own_logps:
            raise ValueError("a sampler that isn't the trainer needs `own_logps`")
        self.model = model
        self.reference = reference
        self.rewards = rewards
        self.engine = engine
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.own_logps = own_logps
        self.importance_cap = importance_cap
        self.other_sampler = other_sampler
        self.full_precision = full_precision
        self.limits = (FULL_PRECISION if full_precision else HALF_PRECISION).at(model.temperature)
        self._padding_checked = False
        # The trainer puts its own in place: replies are drawn at the precision that they are trained at.
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.gathered: Callable[[], AbstractContextManager[None]] = nullcontext

    def collect(
        self,
        rows: Sequence[dict[str, Any]],
        sampling: Sampling,
        row_seeds: Sequence[int],
        *,
        untrained: bool = False,
    ) -> Collected:
        """Episodes for prompt rows (``prompt_ids``, and ``prompt`` and ``extra`` as JSON), all tensors on the CPU.

        With `untrained` the policy must be its reference. Raises GuardError where the numbers can't be a policy's own.
        """
        prompt_ids = [list(row["prompt_ids"]) for row in rows]
        with self.gathered(), self.autocast():
            started = time.perf_counter()
            self._check_padding(prompt_ids)
            rollout = self.engine.generate(prompt_ids, sampling, row_seeds=row_seeds)
            drawn = time.perf_counter()
            refuse_wrong_ends(rollout, sampling)
            replies = self.read(rows, rollout.response_ids)
            scores, terms = self.rewards(replies)
            sampled = torch.tensor([logp for row in rollout.logprobs for logp in row])
            measured = self._measure(prompt_ids, rollout.response_ids, logps=self.own_logps or untrained)
            ref_logps, own_logps, values, bootstrap = measured
            scored = time.perf_counter()
        if own_logps is not None:
            self._refuse_gap(own_logps, sampled, rollout, sampling)
        if own_logps is not None and untrained:
            refuse_other_reference(own_logps, ref_logps, self.limits.reference)
        if not self.own_logps:
            own_logps = None
        episodes = Episodes(
            prompt_ids=prompt_ids,
            response_ids=rollout.response_ids,
            ended=torch.tensor(rollout.ended),
            logps=sampled if own_logps is None else own_logps,
            ref_logps=ref_logps,
            values=values,
            bootstrap=bootstrap,
            scores=scores,
            score_terms=terms,
            importance_weights=self._importance_weights(own_logps, sampled),
        )
        gap = None if own_logps is None else float((own_logps - sampled).abs().mean())
        return Collected(episodes=episodes, rollout_s=drawn - started, score_s=scored - drawn, logprob_gap=gap)

    def _check_padding(self, prompt_ids: list[list[int]]) -> None:
        if isinstance(self.engine, TransformersRollout) and not self._padding_checked:
            refuse_padding_that_counts(self.engine, prompt_ids, full_precision=self.full_precision)
            self._padding_checked = True

    def _refuse_gap(self, own_logps: Tensor, sampled: Tensor, rollout: Rollout, sampling: Sampling) -> None:
        if self.other_sampler:
            refuse_other_engine(own_logps, sampled, [len(ids) for ids in rollout.response_ids], sampling)
        else:
            refuse_gap(own_logps, sampled, self.limits.gap)

    def _importance_weights(self, own_logps: Tensor | None, sampled: Tensor) -> Tensor | None:
        if self.importance_cap is None or own_logps is None:
            return None
        mask = torch.ones_like(sampled, dtype=torch.bool)
        return importance_weights(own_logps, sampled, mask, cap=self.importance_cap)

    def draw(self, rows: Sequence[dict[str, Any]], sampling: Sampling, row_seeds: Sequence[int]) -> Replies:
        """Replies to prompt rows with nothing measured on them."""
        with self.gathered(), self.autocast():
            rollout = self.engine.generate([list(row["prompt_ids"]) for row in rows], sampling, row_seeds=row_seeds)
        return self.read(rows, rollout.response_ids)

    def read(self, rows: Sequence[dict[str, Any]], response_ids: list[list[int]]) -> Replies:
        """Replies with their texts, for the rewards."""
        return Replies(
            prompt_ids=[list(row["prompt_ids"]) for row in rows],
            response_ids=response_ids,
            prompts=[json.loads(row["prompt"]) for row in rows],
            texts=self.tokenizer.batch_decode(response_ids, skip_special_tokens=True),
            extras=[json.loads(row["extra"]) for row in rows],
        )

    def _measure(
        self, prompt_ids: list[list[int]], response_ids: list[list[int]], *, logps: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Reference log-probabilities, the policy's or None, values (K,), values after the last token (B,)."""
        device = self.model.value_head.weight.device
        # Sorted by length: equal lengths run as one attention call. Undone by `_in_order`.
        order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]) + len(response_ids[row]))
        chunks = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        batches = [
            to_device(collate_sequences([prompt_ids[row] for row in rows], [response_ids[row] for row in rows]), device)
            for rows in chunks
        ]
        with self.reference.use() as reference, torch.no_grad():
            ref_logps = [token_logprobs(reference, b, temperature=self.model.temperature)[0].cpu() for b in batches]
        measured = [self.model.measure(batch, logps=logps) for batch in batches]
        lengths = [len(response_ids[row]) for row in order]
        own_logps = [own.cpu() for own, _, _ in measured if own is not None]
        bootstrap = torch.empty(len(order))
        bootstrap[order] = torch.cat([last.cpu() for _, _, last in measured])
        return (
            _in_order(ref_logps, order, lengths),
            _in_order(own_logps, order, lengths) if own_logps else None,
            _in_order([values.cpu() for _, values, _ in measured], order, lengths),
            bootstrap,
        )


@dataclass(frozen=True, kw_only=True)
class Play:
    """What PPO needs beyond the trainer's own parts."""

    collector: Collector
    sampling: Sampling
    schedule: Schedule
    ptx_rows: Any | None = None


def _in_order(parts: list[Tensor], order: list[int], lengths: list[int]) -> Tensor:
    """(K,) values whose rows came in `order`, with these lengths, put back in the rows' own order."""
    pieces = dict(zip(order, torch.split(torch.cat(parts), lengths), strict=True))
    return torch.cat([pieces[row] for row in range(len(order))])


def speeds(parts: Sequence[Collected]) -> dict[str, float]:
    """Tokens a second of drawing and of scoring, over all processes, and the gap between their log-probabilities."""
    response = sum(len(part.episodes.logps) for part in parts)
    prompt = sum(len(ids) for part in parts for ids in part.episodes.prompt_ids)
    found = {
        "speed/rollout_tokens_per_s": response / max(part.rollout_s for part in parts),
        "speed/score_tokens_per_s": (prompt + response) / max(part.score_s for part in parts),
    }
    gaps = [part.logprob_gap for part in parts if part.logprob_gap is not None]
    return found | ({"sampler/logprob_gap": sum(gaps) / len(gaps)} if gaps else {})
