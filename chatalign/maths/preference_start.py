"""What each DPO loss is before the first update, by hand: a second table, to hold the first one's choice to.

The policy is still its reference, so that every log-ratio is 0 and only the loss's own shape is left. All but a few
losses differ here in value or slope (with ε = 0 `robust`, `aot` and `aot_unpaired` are `sigmoid` on one pair).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from chatalign.maths.preference_losses import DPOLossType


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a loss may read: β, ε (label smoothing), DiscoPOP's τ, and the replies' lengths in tokens."""

    beta: float
    epsilon: float
    tau: float
    chosen: float
    rejected: float


Start = tuple[float, float, float]  # the loss, its slopes in log π(chosen) and log π(rejected)
_LN2 = math.log(2)


def _on_difference(value: float, slope: float, given: Given) -> Start:
    """Of a loss of β (w − l) with this value and slope at 0."""
    return value, slope * given.beta, -slope * given.beta


# Equations: chatalign.maths.preference_losses. σ(0) = ½, σ′(0) = ¼, (log σ)′(0) = ½.
_AT_START: dict[DPOLossType, Callable[[Given], Start]] = {
    "sigmoid": lambda g: _on_difference(_LN2, -0.5, g),
    "sigmoid_norm": lambda g: (_LN2, -0.5 * g.beta / g.chosen, 0.5 * g.beta / g.rejected),
    "hinge": lambda g: _on_difference(1.0, -1.0, g),
    "ipo": lambda g: (0.25 / g.beta**2, -1 / (g.beta * g.chosen), 1 / (g.beta * g.rejected)),
    "exo_pair": lambda g: _on_difference(
        -_LN2 - 0.5 * math.log(g.epsilon * (1 - g.epsilon)), 0.25 * math.log(g.epsilon / (1 - g.epsilon)), g
    ),
    "nca_pair": lambda g: (2 * _LN2, -0.25 * g.beta, 0.25 * g.beta),
    "robust": lambda g: _on_difference(_LN2, -0.5 / (1 - 2 * g.epsilon), g),
    "bco_pair": lambda g: (2 * _LN2, -0.5 * g.beta, 0.5 * g.beta),
    "sppo_hard": lambda g: (0.5 / g.beta**2, -1 / g.beta, 1 / g.beta),
    "aot": lambda g: _on_difference(_LN2, -(0.5 - g.epsilon), g),
    "aot_unpaired": lambda g: _on_difference(_LN2, -(0.5 - g.epsilon), g),
    "apo_zero": lambda g: (1.0, -0.25 * g.beta, 0.25 * g.beta),
    "apo_down": lambda g: (1.0, 0.0, 0.25 * g.beta),
    "discopop": lambda g: _on_difference(0.5 * _LN2 + 0.5, (1 - _LN2) / (4 * g.tau) - 0.75, g),
    "sft": lambda g: (0.0, -1 / g.chosen, 0.0),
}


def loss_at_start(
    loss_type: DPOLossType,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    lengths: tuple[float, float] = (1.0, 1.0),
) -> Start:
    """Loss of one pair whose replies have these lengths, log π = log π_ref = 0, and its slopes in both log π."""
    given = Given(beta=beta, epsilon=label_smoothing, tau=discopop_tau, chosen=lengths[0], rejected=lengths[1])
    return _AT_START[loss_type](given)
