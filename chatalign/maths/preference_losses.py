"""Every `loss_type` of TRL 1.16's DPO, written from the papers, in one literal table. Call them through `dpo_loss`.

Shapes: B pairs. A log-probability here is that of a whole reply, the sum over its tokens, in nats.
Notation in the docstrings: w, l are the chosen and rejected log-ratios log π − log π_ref; f′ maps them to scores
(the identity under reverse KL), d is the score difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

DPOLossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What a loss may read, all (B,) and in fp32, with the options it may read."""

    chosen_logps: Tensor
    chosen_logratios: Tensor
    rejected_logratios: Tensor
    policy_margins: Tensor
    ref_margins: Tensor
    chosen_scores: Tensor
    rejected_scores: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    beta: float
    label_smoothing: float
    discopop_tau: float
    sft_tokens_per_reply: Tensor | float | None

    @property
    def logits(self) -> Tensor:
        """β d, the argument of most losses."""
        return self.beta * (self.chosen_scores - self.rejected_scores)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Token counts of the chosen and rejected replies, at least 1. Raises ValueError where not given."""
        if self.chosen_lengths is None or self.rejected_lengths is None:
            raise ValueError("this loss is normalised by length; pass chosen_lengths_B and rejected_lengths_B")
        return self.chosen_lengths.clamp(min=1).float(), self.rejected_lengths.clamp(min=1).float()

    def mean_score_difference(self) -> Tensor:
        """d with either score divided by its reply's length."""
        chosen_lengths, rejected_lengths = self.lengths()
        return self.chosen_scores / chosen_lengths - self.rejected_scores / rejected_lengths


def _sigmoid(pairs: Pairs) -> Tensor:
    """−log σ(β d). Rafailov et al., DPO (2305.18290), eq. 7."""
    return -F.logsigmoid(pairs.logits)


def _sigmoid_norm(pairs: Pairs) -> Tensor:
    """−log σ(β d) with mean scores per token. Lambert et al., Tülu 3 (2411.15124)."""
    return -F.logsigmoid(pairs.beta * pairs.mean_score_difference())


def _hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 − β d). Zhao et al., SLiC-HF (2305.10425); Liu et al., RSO (2309.06657)."""
    return torch.relu(1 - pairs.logits)


def _ipo(pairs: Pairs) -> Tensor:
    """(d − 1 / 2β)², β being the paper's τ, with mean scores per token. Azar et al., IPO (2310.12036), eq. 17."""
    return (pairs.mean_score_difference() - 1 / (2 * pairs.beta)).square()


def _exo_pair(pairs: Pairs) -> Tensor:
    """KL((σ(β d), σ(−β d)) ‖ (1 − ε, ε)), ε = label_smoothing. Ji et al., EXO (2402.00856), eq. 16."""
    epsilon = pairs.label_smoothing
    if not 0 < epsilon < 1:
        raise ValueError(f"label_smoothing is {epsilon}; exo_pair needs it in (0, 1), the paper takes 1e-3")
    log_win_B, log_lose_B = F.logsigmoid(pairs.logits), F.logsigmoid(-pairs.logits)
    win_B = log_win_B.exp() * (log_win_B - math.log1p(-epsilon))
    return win_B + log_lose_B.exp() * (log_lose_B - math.log(epsilon))


def _nca_pair(pairs: Pairs) -> Tensor:
    """−log σ(β w) − ½ log σ(−β w) − ½ log σ(−β l). Chen et al., NCA (2402.05369)."""
    chosen_B, rejected_B = pairs.beta * pairs.chosen_logratios, pairs.beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


def _robust(pairs: Pairs) -> Tensor:
    """(−(1 − ε) log σ(β d) + ε log σ(−β d)) / (1 − 2ε), ε the flip rate. Chowdhury et al. (2403.00409)."""
    epsilon = pairs.label_smoothing
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"label_smoothing is {epsilon}; robust takes a rate of flipped labels in [0, 0.5)")
    clean_B = -(1 - epsilon) * F.logsigmoid(pairs.logits)
    return (clean_B + epsilon * F.logsigmoid(-pairs.logits)) / (1 - 2 * epsilon)


def _bco_pair(pairs: Pairs) -> Tensor:
    """−log σ(β w) − log σ(−β l), with no reward shift. Jung et al., BCO (2404.04656)."""
    return -F.logsigmoid(pairs.beta * pairs.chosen_logratios) - F.logsigmoid(-pairs.beta * pairs.rejected_logratios)


def _sppo_hard(pairs: Pairs) -> Tensor:
    """(w − 1 / 2β)² + (l + 1 / 2β)². Wu et al., SPPO (2405.00675), eq. 4.7 with hard win rates 1 and 0."""
    half = 0.5 / pairs.beta
    return (pairs.chosen_logratios - half).square() + (pairs.rejected_logratios + half).square()


def _smoothed(pairs: Pairs, difference_B: Tensor) -> Tensor:
    epsilon, logits_B = pairs.label_smoothing, pairs.beta * difference_B
    return -(1 - epsilon) * F.logsigmoid(logits_B) - epsilon * F.logsigmoid(-logits_B)


def _aot(pairs: Pairs) -> Tensor:
    """Sorted policy margins against sorted reference margins. Melnyk et al., AOT (2406.05882), paired.

    Depends on which pairs share a batch, and losses are in sorted order, not the pairs'.
    """
    return _smoothed(pairs, pairs.policy_margins.sort().values - pairs.ref_margins.sort().values)


def _aot_unpaired(pairs: Pairs) -> Tensor:
    """Sorted chosen log-ratios against sorted rejected ones. Melnyk et al., AOT (2406.05882), unpaired.

    Depends on which pairs share a batch, and losses are in sorted order, not the pairs'.
    """
    return _smoothed(pairs, pairs.chosen_logratios.sort().values - pairs.rejected_logratios.sort().values)


def _apo_zero(pairs: Pairs) -> Tensor:
    """1 − σ(β w) + σ(β l), for chosen replies better than the model's. D'Oosterlinck et al. (2408.06266), eq. 7."""
    return torch.sigmoid(-pairs.beta * pairs.chosen_logratios) + torch.sigmoid(pairs.beta * pairs.rejected_logratios)


def _apo_down(pairs: Pairs) -> Tensor:
    """σ(β w) + 1 − σ(β (w − l)), for chosen replies worse than the model's. Same paper, eq. 8."""
    difference_B = pairs.chosen_logratios - pairs.rejected_logratios
    return torch.sigmoid(pairs.beta * pairs.chosen_logratios) + torch.sigmoid(-pairs.beta * difference_B)


def _discopop(pairs: Pairs) -> Tensor:
    """(1 − m)(−log σ(β d)) + m exp(−β d), m = σ(β d / τ). Lu et al., DiscoPOP (2406.08414), eq. 5."""
    logits_B = pairs.logits
    log_mix_B = F.logsigmoid(logits_B / pairs.discopop_tau)
    logistic_B = -F.logsigmoid(logits_B) * torch.sigmoid(-logits_B / pairs.discopop_tau)
    # One exponent: exp(−β d) alone overflows where m is 0, and inf · 0 is NaN.
    return logistic_B + (log_mix_B - logits_B).exp()


def _sft(pairs: Pairs) -> Tensor:
    """−log π(chosen) over the mean chosen length, so that the mean over pairs is the mean over tokens.

    The reference plays no part; used in mixtures, as in Pang et al., RPO (2404.19733).
    """
    tokens = pairs.sft_tokens_per_reply
    return -pairs.chosen_logps / (pairs.lengths()[0].mean() if tokens is None else tokens)


DPO_LOSSES: dict[DPOLossType, Callable[[Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}
