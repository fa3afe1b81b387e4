"""Direct preference optimisation: one call for every loss of the table, with f-divergences and mixtures.

Shapes: B pairs, K reply tokens. A log-probability of a reply is the sum over its tokens, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from chatalign.maths.masked import at_least_fp32, require_same_shape
from chatalign.maths.preference_losses import DPO_LOSSES, DPOLossType, Pairs

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


class PreferenceLoss(NamedTuple):
    """`losses_B` carries the gradient; the implicit rewards β · log-ratio are detached. Each is (B,)."""

    losses_B: Tensor
    chosen_rewards_B: Tensor
    rejected_rewards_B: Tensor


# Those that are built on the score difference, for which an f-divergence is defined (2309.16240).
_F_DIVERGENCE_LOSSES: frozenset[DPOLossType] = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
)
_LABEL_SMOOTHING_LOSSES: frozenset[DPOLossType] = frozenset({"exo_pair", "robust", "aot", "aot_unpaired"})
# exp of more than this leaves fp32.
_LARGEST_EXPONENT = 80.0


def _reverse_kl_score(logratios_B: Tensor, alpha: float) -> Tensor:
    """log u, u = π / π_ref."""
    return logratios_B


def _forward_kl_score(logratios_B: Tensor, alpha: float) -> Tensor:
    """1 − 1 / u. (The paper's f′ is −1 / u; a constant cancels in the difference.)"""
    return 1 - (-logratios_B).clamp(max=_LARGEST_EXPONENT).exp()


def _js_score(logratios_B: Tensor, alpha: float) -> Tensor:
    """log 2u / (1 + u)."""
    return math.log(2) + F.logsigmoid(logratios_B)


def _alpha_score(logratios_B: Tensor, alpha: float) -> Tensor:
    """(u^(α − 1) − 1) / (α − 1), which is log u at α = 1."""
    if abs(alpha - 1) < 1e-6:
        return logratios_B
    return torch.expm1(((alpha - 1) * logratios_B).clamp(max=_LARGEST_EXPONENT)) / (alpha - 1)


F_DIVERGENCE_SCORES: dict[FDivergence, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl_score,
    "forward_kl": _forward_kl_score,
    "js_divergence": _js_score,
    "alpha_divergence": _alpha_score,
}


def _score_pairs(
    logratios: tuple[Tensor, Tensor], losses: Sequence[DPOLossType], f_divergence: FDivergence, f_alpha: float
) -> tuple[Tensor, Tensor]:
    """Log-ratios mapped by f′. Raises ValueError where the divergence is unknown or a loss is not defined for it."""
    if f_divergence not in F_DIVERGENCE_SCORES:
        raise ValueError(f"f_divergence is {f_divergence!r}; expected one of {sorted(F_DIVERGENCE_SCORES)}")
    undefined = sorted(set(losses) - _F_DIVERGENCE_LOSSES)
    if f_divergence != "reverse_kl" and undefined:
        raise ValueError(f"{undefined} are not defined under {f_divergence}; use reverse_kl or another loss_type")
    score = F_DIVERGENCE_SCORES[f_divergence]
    return score(logratios[0], f_alpha), score(logratios[1], f_alpha)


def _weighted_losses(
    loss_type: DPOLossType | Sequence[DPOLossType], loss_weights: Sequence[float] | None, label_smoothing: float
) -> dict[DPOLossType, float]:
    """Each loss with its weight. Raises ValueError on an unknown name, a repeated one, or an option nobody reads."""
    losses: list[DPOLossType] = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    unknown = [name for name in losses if name not in DPO_LOSSES]
    if unknown or not losses or len(set(losses)) < len(losses):
        raise ValueError(f"loss_type is {losses}; expected different names out of {list(DPO_LOSSES)}")
    weights = [1.0] * len(losses) if loss_weights is None else list(loss_weights)
    if len(weights) != len(losses):
        raise ValueError(f"{len(weights)} loss_weights for {len(losses)} loss_types; give one for each")
    if label_smoothing and not _LABEL_SMOOTHING_LOSSES & set(losses):
        raise ValueError(
            f"label_smoothing is {label_smoothing}, which {losses} would ignore; it acts in "
            f"{sorted(_LABEL_SMOOTHING_LOSSES)} ('robust' is the sigmoid loss under flipped labels)"
        )
    return dict(zip(losses, weights, strict=True))


def dpo_loss(
    *,
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    ref_chosen_logps_B: Tensor | None = None,
    ref_rejected_logps_B: Tensor | None = None,
    loss_type: DPOLossType | Sequence[DPOLossType] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    reference_free: bool = False,
    chosen_lengths_B: Tensor | None = None,
    rejected_lengths_B: Tensor | None = None,
    sft_logps_B: Tensor | None = None,
    sft_tokens_per_reply: Tensor | float | None = None,
) -> PreferenceLoss:
    """Loss of each pair and the implicit rewards β (log π − log π_ref), each (B,). Take the mean over pairs to train.

    Several `loss_type`s are added with `loss_weights` (1 by default). Under `reference_free` log π_ref counts as 0.
    Lengths, in tokens, are needed by ipo, sigmoid_norm and sft. `sft` reads `sft_logps_B` where given (plain sums
    where the others are reweighted) and divides by `sft_tokens_per_reply`, the global batch's mean chosen length.
    Raises ValueError where shapes differ, a name is unknown, or an option does not fit the loss.
    Sources: beside each loss; f-divergences: Wang et al. (2309.16240).
    """
    weights = _weighted_losses(loss_type, loss_weights, label_smoothing)
    if reference_free:
        ref_chosen_logps_B = ref_rejected_logps_B = torch.zeros_like(chosen_logps_B)
    if ref_chosen_logps_B is None or ref_rejected_logps_B is None:
        raise ValueError("the reference's log-probabilities are missing; pass both, or reference_free=True")
    chosen_B, rejected_B = at_least_fp32(chosen_logps_B), at_least_fp32(rejected_logps_B)
    ref_chosen_B, ref_rejected_B = ref_chosen_logps_B.detach(), ref_rejected_logps_B.detach()
    require_same_shape(chosen=chosen_B, rejected=rejected_B, ref_chosen=ref_chosen_B, ref_rejected=ref_rejected_B)
    logratios = chosen_B - ref_chosen_B, rejected_B - ref_rejected_B
    scores = _score_pairs(logratios, list(weights), f_divergence, f_alpha)
    pairs = Pairs(
        chosen_logps=chosen_B if sft_logps_B is None else at_least_fp32(sft_logps_B),
        chosen_logratios=logratios[0],
        rejected_logratios=logratios[1],
        policy_margins=chosen_B - rejected_B,
        ref_margins=at_least_fp32(ref_chosen_B) - at_least_fp32(ref_rejected_B),
        chosen_scores=scores[0],
        rejected_scores=scores[1],
        chosen_lengths=chosen_lengths_B,
        rejected_lengths=rejected_lengths_B,
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        sft_tokens_per_reply=sft_tokens_per_reply,
    )
    losses_B = torch.stack([weight * DPO_LOSSES[name](pairs) for name, weight in weights.items()]).sum(0)
    return PreferenceLoss(losses_B, beta * logratios[0].detach(), beta * logratios[1].detach())


def length_desensitised_weights(positions_K: Tensor, shared_lengths_K: Tensor, alpha: float) -> Tensor:
    """Weight of each reply token's log-probability, (K,): 1 up to the pair's shared length, `alpha` beyond it.

    `positions_K` counts tokens within a reply from 0; `shared_lengths_K` is the shorter reply's length, per token.
    Raises ValueError where the shapes differ or alpha is not in [0, 1].
    Source: Liu et al., LD-DPO (2409.06411).
    """
    require_same_shape(positions=positions_K, shared_lengths=shared_lengths_K)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a share in [0, 1]")
    return torch.where(positions_K < shared_lengths_K, 1.0, alpha)
