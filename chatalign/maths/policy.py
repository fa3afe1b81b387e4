"""The policy's side of PPO: clipped loss, entropy bonus, importance correction, and their masked statistics.

Shapes: B batch, T response tokens; every function takes any one shape, a flat (K,) included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chatalign.maths.masked import at_least_fp32, masked_mean, masked_sum, masked_var, require_same_shape


class PolicyLoss(NamedTuple):
    """Scalars. `loss` carries the gradient; the rest are detached means over the mask."""

    loss: Tensor
    approxkl: Tensor  # k3 estimate of KL(old‖new) in nats
    clipfrac: Tensor  # share of tokens whose clipped term is the one in the loss
    ratio_mean: Tensor
    ratio_var: Tensor


def normalised_sum(values_BT: Tensor, mask_BT: Tensor, normaliser: Tensor | float | None) -> Tensor:
    """Sum over the mask divided by `normaliser`, or by the mask's own token count where it is None; a scalar.

    A caller whose batch is split over steps or processes passes the token count of the whole.
    Raises ValueError where the shapes differ.
    """
    divisor = mask_BT.bool().sum().clamp(min=1) if normaliser is None else normaliser
    return masked_sum(values_BT, mask_BT) / divisor


def policy_loss(
    *,
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    normaliser: Tensor | float | None = None,
    importance_weights_BT: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, negated: mean over tokens of −min(r A, clip(r, 1 − ε, 1 + ε_high) A), r = π / π_old.

    `clip_range_high` defaults to `clip_range`. `importance_weights_BT` multiplies each token's loss (see
    `importance_weights`). Only `logps_BT` receives a gradient. Raises ValueError where the shapes differ.
    Source: Schulman et al. (1707.06347), eq. 7; asymmetric clip: Yu et al. (DAPO, 2503.14476).
    """
    require_same_shape(logps=logps_BT, old_logps=old_logps_BT, advantages=advantages_BT, mask=mask_BT)
    mask_BT = mask_BT.bool()
    # Masked before exp: an infinite ratio off the mask would turn the gradient into NaN.
    difference_BT = at_least_fp32(logps_BT) - at_least_fp32(old_logps_BT.detach())
    log_ratio_BT = torch.where(mask_BT, difference_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    advantages_BT = torch.where(mask_BT, at_least_fp32(advantages_BT.detach()), 0.0)
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_range, 1 + high)
    losses_BT = torch.maximum(unclipped_BT, clipped_BT)
    if importance_weights_BT is not None:
        require_same_shape(logps=logps_BT, importance_weights=importance_weights_BT)
        losses_BT = losses_BT * torch.where(mask_BT, importance_weights_BT.detach(), 0.0)
    loss = normalised_sum(losses_BT, mask_BT, normaliser)
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            approxkl=masked_mean(torch.expm1(log_ratio_BT) - log_ratio_BT, mask_BT),
            clipfrac=masked_mean((clipped_BT > unclipped_BT).float(), mask_BT),
            ratio_mean=masked_mean(ratio_BT, mask_BT),
            ratio_var=masked_var(ratio_BT, mask_BT),
        )


def entropy_bonus(
    entropy_BT: Tensor, mask_BT: Tensor, *, coef: float, normaliser: Tensor | float | None = None
) -> Tensor:
    """The term −coef · mean entropy to add to the loss, a scalar; entropy in nats per token.

    Raises ValueError where the shapes differ. Source: Schulman et al. (1707.06347), eq. 9.
    """
    return -coef * normalised_sum(entropy_BT, mask_BT, normaliser)


def sampler_excess(logps_K: Tensor, sampler_logps_K: Tensor, allowed_K: Tensor) -> Tensor:
    """How far a sampler's log-probabilities lie outside [logp, logp + allowed], in nats, shape (K,); 0 inside.

    A sampler that leaves tokens out (top-p, top-k, a minimum length) divides the rest by what it keeps: by at least
    top_p, so its log-probabilities exceed the model's by at most −log(top_p).
    Raises ValueError where the shapes differ.
    """
    require_same_shape(logps=logps_K, sampler_logps=sampler_logps_K, allowed=allowed_K)
    over_K = at_least_fp32(sampler_logps_K.detach()) - at_least_fp32(logps_K.detach())
    return (over_K - allowed_K).clamp(min=0) + (-over_K).clamp(min=0)


def importance_weights(logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, *, cap: float = 2.0) -> Tensor:
    """Truncated importance weights min(π_trainer / π_sampler, cap), shape (B, T), detached, 0 off the mask.

    They correct for tokens drawn by an engine whose probabilities are not quite the trainer's.
    Raises ValueError where the shapes differ. Source: Yao et al. (2025), "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training" (truncated importance sampling).
    """
    require_same_shape(logps=logps_BT, sampler_logps=sampler_logps_BT, mask=mask_BT)
    gap_BT = at_least_fp32(logps_BT.detach()) - at_least_fp32(sampler_logps_BT.detach())
    return torch.where(mask_BT.bool(), gap_BT.exp().clamp(max=cap), 0.0)
