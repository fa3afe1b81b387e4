"""Kullback–Leibler divergence: per-token estimators, the exact sum, and the controllers of its coefficient.

Shapes: B batch, T response tokens, V vocabulary; the estimators take any one shape, a flat (K,) included.
All divergences are in nats.

As rewards (no gradient) k1 and k3 are unbiased. As *losses* on tokens sampled from the policy they are not alike:
the expected gradient of k1 is zero, that of k2 is the gradient of KL(policy‖reference), and that of k3 is the
gradient of KL(reference‖policy). Differentiate k2 where a KL loss is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chatalign.maths.masked import at_least_fp32, require_same_shape


def _log_ratio(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    require_same_shape(logp=logp_BT, ref_logp=ref_logp_BT)
    return at_least_fp32(logp_BT) - at_least_fp32(ref_logp_BT)


def k1(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """Per-token estimate log π − log π_ref of KL(policy‖reference) in nats, shape (B, T); of either sign.

    Unbiased where the tokens were sampled from the policy.
    Raises ValueError where the shapes differ. Source: Schulman (2020), "Approximating KL Divergence".
    """
    return _log_ratio(logp_BT, ref_logp_BT)


def k2(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """Per-token estimate ½ (log π − log π_ref)² of KL(policy‖reference) in nats, shape (B, T); never negative.

    Biased as an estimate, yet its expected gradient is that of KL(policy‖reference).
    Raises ValueError where the shapes differ. Source: Schulman (2020), "Approximating KL Divergence".
    """
    return 0.5 * _log_ratio(logp_BT, ref_logp_BT).square()


def k3(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """Per-token estimate r − 1 − log r, r = π_ref / π, of KL(policy‖reference) in nats, shape (B, T); never negative.

    Unbiased where the tokens were sampled from the policy.
    Raises ValueError where the shapes differ. Source: Schulman (2020), "Approximating KL Divergence".
    """
    log_ratio_BT = _log_ratio(logp_BT, ref_logp_BT)
    return torch.expm1(-log_ratio_BT) + log_ratio_BT


def kl_exact(logits_p_KV: Tensor, logits_q_KV: Tensor) -> Tensor:
    """KL(softmax p ‖ softmax q) in nats over the last dimension, shape (K,); differentiable in both.

    A −inf logit is a token of probability 0; where p has it, it adds 0. Raises ValueError where the shapes differ.
    """
    require_same_shape(logits_p=logits_p_KV, logits_q=logits_q_KV)
    logp_KV = at_least_fp32(logits_p_KV).log_softmax(-1)
    logq_KV = at_least_fp32(logits_q_KV).log_softmax(-1)
    possible_KV = logp_KV > -math.inf
    # Both sides are filled before the difference: −inf − −inf is NaN, and so would be its gradient.
    safe_logp_KV = torch.where(possible_KV, logp_KV, 0.0)
    safe_logq_KV = torch.where(possible_KV, logq_KV, 0.0)
    return (logp_KV.exp() * (safe_logp_KV - safe_logq_KV)).sum(-1)


def _load_coef(state: Mapping[str, float]) -> float:
    if set(state) != {"coef"}:
        raise ValueError(f"a KL controller's state has the key 'coef' alone; got {sorted(state)}")
    return float(state["coef"])


@dataclass
class FixedKLController:
    """A KL coefficient that never moves. `coef` is in reward units per nat."""

    coef: float

    def update(self, kl: float, n_episodes: int) -> None:
        """Changes nothing; here so that both controllers are driven alike."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores `state_dict`, in place. Raises ValueError on other keys."""
        self.coef = _load_coef(state)


@dataclass
class AdaptiveKLController:
    """A KL coefficient that a proportional controller steers towards `target` nats per episode.

    e = clip(KL / target − 1, −0.2, 0.2);  coef ← coef · (1 + e · n_episodes / horizon).
    `horizon` is in episodes. Raises ValueError unless coef, target and horizon are positive.
    Source: Ziegler et al. (1909.08593), section 2, with K_β = n_episodes / horizon as in their code.
    """

    coef: float
    target: float
    horizon: float
    clip: float = 0.2

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; an adaptive KL controller needs it positive")

    def update(self, kl: float, n_episodes: int) -> None:
        """Moves the coefficient, given the mean KL per episode in nats over `n_episodes` episodes, in place.

        Raises ValueError where kl is not finite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the measured KL is {kl}; the coefficient cannot follow it")
        error = min(max(kl / self.target - 1, -self.clip), self.clip)
        self.coef *= 1 + error * n_episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; target and horizon are the recipe's."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores `state_dict`, in place. Raises ValueError on other keys."""
        self.coef = _load_coef(state)
