"""From finished replies to what the update needs: per-token rewards, advantages, returns, and their metrics.

Everything here is on the CPU, over the whole rollout of all processes, so that whitening and metrics do not depend
on how the rollout was split. Shapes: B replies, T response tokens of the longest, K response tokens of all replies.
Sources: Huang et al. (2403.17031); Ouyang et al. (2203.02155); Schulman et al. (1506.02438).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chatalign.engine.ppo_guard import refuse_lost_scores
from chatalign.maths import k1, k2, k3, masked_moments, masked_whiten, penalise_missing_stop
from chatalign.maths.gae import gae, token_rewards
from chatalign.maths.value import explained_variance
from chatalign.recipe import PpoSection

KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@dataclass
class Episodes:
    """Replies with everything measured on them under the weights that drew them, one entry a reply.

    ``logps``, ``ref_logps`` and ``values`` hold one number a response token, concatenated in the order of the
    replies (K,); ``bootstrap`` is the value of the state after the last token (B,), ``scores`` the reward (B,).
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    ended: Tensor
    logps: Tensor
    ref_logps: Tensor
    values: Tensor
    bootstrap: Tensor
    scores: Tensor
    score_terms: dict[str, Tensor] = field(default_factory=dict)  # each reward by itself, unweighted (B,)
    importance_weights: Tensor | None = None  # (K,) where a sampler's distribution isn't quite the policy's

    @property
    def lengths(self) -> Tensor:
        """Response tokens of each reply, (B,)."""
        return torch.tensor([len(ids) for ids in self.response_ids])

    @staticmethod
    def join(parts: Sequence[Episodes]) -> Episodes:
        """The episodes of several processes as one, in the processes' order."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        return Episodes(
            prompt_ids=[ids for part in parts for ids in part.prompt_ids],
            response_ids=[ids for part in parts for ids in part.response_ids],
            ended=joined("ended"),
            logps=joined("logps"),
            ref_logps=joined("ref_logps"),
            values=joined("values"),
            bootstrap=joined("bootstrap"),
            scores=joined("scores"),
            score_terms={name: torch.cat([part.score_terms[name] for part in parts]) for name in parts[0].score_terms},
            importance_weights=None if parts[0].importance_weights is None else joined("importance_weights"),
        )


@dataclass
class Experience:
    """A rollout as the update reads it: (K,) tensors in the order of the replies."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]
    importance_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.response_ids)

    def select(self, rows: Sequence[int]) -> dict[str, Any]:
        """Prompts, responses and the (K',) tensors of some replies, in the order of `rows`."""
        lengths = [len(ids) for ids in self.response_ids]
        chosen: dict[str, Any] = {
            "prompt_ids": [self.prompt_ids[row] for row in rows],
            "response_ids": [self.response_ids[row] for row in rows],
        }
        names = ["old_logps", "old_values", "advantages", "returns"]
        for name in names if self.importance_weights is None else [*names, "importance_weights"]:
            pieces = torch.split(getattr(self, name), lengths)
            chosen[name] = torch.cat([pieces[row] for row in rows])
        return chosen


def make_experience(episodes: Episodes, section: PpoSection, *, kl_coef: float) -> Experience:
    """Rewards, advantages and returns of a whole rollout (PPO.md's steps 3, 5 and 6).

    Per token −kl_coef · KL estimate, the score at the last response token, GAE over response tokens alone, the value
    after the last token where a reply was cut by its length and 0 where it ended, advantages whitened over all.
    """
    mask_BT = torch.arange(int(episodes.lengths.max())) < episodes.lengths[:, None]
    logps_BT, ref_logps_BT, values_BT = (
        unflatten(x, mask_BT) for x in (episodes.logps, episodes.ref_logps, episodes.values)
    )
    kl_BT = KL_ESTIMATORS[section.kl_estimator](logps_BT, ref_logps_BT)
    score_B = final_scores(episodes, section)
    rewards_BT = token_rewards(score_B, kl_BT, mask_BT, kl_coef)
    refuse_lost_scores(rewards_BT, kl_BT, mask_BT, score_B, kl_coef)
    if section.whiten_rewards:
        # shift_mean false: a shifted reward would pay for every further token (2403.17031).
        rewards_BT = masked_whiten(rewards_BT, mask_BT, shift_mean=False)
    bootstrap_B = torch.where(episodes.ended, 0.0, episodes.bootstrap)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, section.gamma, section.lam, bootstrap_B)
    metrics = rollout_metrics(
        episodes, mask_BT=mask_BT, score_B=score_B, kl_BT=k1(logps_BT, ref_logps_BT), kl_coef=kl_coef
    )
    metrics["objective/kl_k3"] = _episode_mean(k3(logps_BT, ref_logps_BT), mask_BT)
    metrics["objective/non_score_reward"] = -kl_coef * _episode_mean(kl_BT, mask_BT)
    metrics["objective/rlhf_reward"] = metrics["objective/score"] + metrics["objective/non_score_reward"]
    metrics["value/explained_variance"] = float(explained_variance(values_BT, returns_BT, mask_BT))
    metrics["value/mean"] = float(episodes.values.mean())
    metrics["value/return_mean"] = float(returns_BT[mask_BT].mean())
    if episodes.importance_weights is not None:
        metrics |= importance_metrics(episodes.importance_weights, cap=section.vllm_importance_sampling_clip_max)
    metrics["advantage/std"] = float(masked_moments(advantages_BT, mask_BT).var.sqrt())
    if section.whiten_advantages:
        advantages_BT = masked_whiten(advantages_BT, mask_BT)
    return Experience(
        prompt_ids=episodes.prompt_ids,
        response_ids=episodes.response_ids,
        old_logps=episodes.logps,
        old_values=episodes.values,
        advantages=advantages_BT[mask_BT],
        returns=returns_BT[mask_BT],
        metrics=metrics,
        importance_weights=episodes.importance_weights,
    )


def importance_metrics(weights_K: Tensor, *, cap: float) -> dict[str, float]:
    """What the correction of the sampler does: its mean weight, and the share of tokens whose weight is the cap."""
    return {
        "sampler/importance_weight": float(weights_K.mean()),
        "sampler/capped": float((weights_K >= cap).float().mean()),
    }


def final_scores(episodes: Episodes, section: PpoSection) -> Tensor:
    """Scores as the policy is paid, (B,): clipped, then less the penalty where a reply has no stop token."""
    score_B = episodes.scores
    if section.reward_clip is not None:
        score_B = score_B.clamp(-section.reward_clip, section.reward_clip)
    if section.missing_eos_penalty is not None:
        score_B = penalise_missing_stop(score_B, episodes.ended, section.missing_eos_penalty)
    return score_B


def rollout_metrics(
    episodes: Episodes, *, mask_BT: Tensor, score_B: Tensor, kl_BT: Tensor, kl_coef: float
) -> dict[str, float]:
    """What is known of a rollout before any update; every number is defined in docs/ppo.md."""
    lengths_B = episodes.lengths.float()
    metrics = {
        "objective/kl": _episode_mean(kl_BT, mask_BT),
        "objective/kl_coef": kl_coef,
        "objective/score": float(score_B.mean()),
        "objective/score_std": float(score_B.std(correction=0)),
        "objective/entropy": -_episode_mean(unflatten(episodes.logps, mask_BT), mask_BT),
        "reply/length": float(lengths_B.mean()),
        "reply/eos_rate": float(episodes.ended.float().mean()),
        "reply/score_length_correlation": _correlation(score_B, lengths_B),
    }
    for name, term_B in episodes.score_terms.items():
        metrics[f"reward/{name}"] = float(term_B.mean())
    return metrics


def evaluation_metrics(episodes: Episodes, section: PpoSection, *, kl_coef: float) -> dict[str, Tensor]:
    """What is reported of replies that nothing is trained on: one observation a reply (B,) each."""
    mask_BT = torch.arange(int(episodes.lengths.max())) < episodes.lengths[:, None]
    logps_BT, ref_logps_BT = unflatten(episodes.logps, mask_BT), unflatten(episodes.ref_logps, mask_BT)
    kl_B = torch.where(mask_BT, k1(logps_BT, ref_logps_BT), 0.0).sum(1)
    score_B = final_scores(episodes, section)
    observed = {
        "objective/kl": kl_B,
        "objective/score": score_B,
        "objective/rlhf_reward": score_B - kl_coef * kl_B,
        "reply/length": episodes.lengths.float(),
        "reply/eos_rate": episodes.ended.float(),
    }
    return observed | {f"reward/{name}": term_B for name, term_B in episodes.score_terms.items()}


def unflatten(values_K: Tensor, mask_BT: Tensor) -> Tensor:
    """(K,) values laid out as (B, T), 0 off the mask."""
    values_BT = torch.zeros(mask_BT.shape, dtype=values_K.dtype)
    values_BT[mask_BT] = values_K
    return values_BT


def _episode_mean(values_BT: Tensor, mask_BT: Tensor) -> float:
    """Mean over replies of the sum over their tokens."""
    return float(torch.where(mask_BT, values_BT, 0.0).sum(1).mean())


def _correlation(a_B: Tensor, b_B: Tensor) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    a_B, b_B = a_B - a_B.mean(), b_B - b_B.mean()
    scale = float(a_B.norm() * b_B.norm())
    return float(a_B @ b_B) / scale if scale > 0 else 0.0
