"""PPO's loss of a micro-batch, what is measured on the way, and the optimizer's two learning rates.

Shapes: K response tokens of the micro-batch; `num_items` are those of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chatalign.engine.batching import Batch
from chatalign.engine.ppo_model import PpoOutput
from chatalign.engine.trainer import Metrics
from chatalign.maths import ValueLoss, entropy_bonus, policy_loss, value_loss
from chatalign.maths.policy import PolicyLoss
from chatalign.recipe import PpoSection


def clipped_policy_loss(
    section: PpoSection, out: PpoOutput, batch: Batch, num_items: float | Tensor
) -> tuple[PolicyLoss, Tensor]:
    """The clipped policy loss, and with − entropy_coef · entropy + ptx_coef · LM loss on top."""
    mask = torch.ones_like(out.logps, dtype=torch.bool)
    policy = policy_loss(
        logps_BT=out.logps,
        old_logps_BT=batch["old_logps"],
        advantages_BT=batch["advantages"],
        mask_BT=mask,
        clip_range=section.cliprange,
        normaliser=num_items,
        importance_weights_BT=batch.get("importance_weights"),
    )
    total = policy.loss
    if section.entropy_coef > 0:
        total = total + entropy_bonus(out.entropy, mask, coef=section.entropy_coef, normaliser=num_items)
    if out.ptx_logps is not None:
        total = total - section.ptx_coef * out.ptx_logps.sum() / batch["ptx_items"]
    return policy, total


def clipped_value_loss(section: PpoSection, values: Tensor, batch: Batch, num_items: float | Tensor) -> ValueLoss:
    """The clipped value loss, before `vf_coef`."""
    return value_loss(
        values_BT=values,
        old_values_BT=batch["old_values"],
        returns_BT=batch["returns"],
        mask_BT=torch.ones_like(values, dtype=torch.bool),
        clip_range=section.cliprange_value,
        normaliser=num_items,
    )


def update_metrics(
    out: PpoOutput, log_ratio: Tensor, policy: PolicyLoss, value: ValueLoss, num_items: float | Tensor
) -> Metrics:
    """Observations of a micro-batch, one a token; every one is defined in docs/ppo.md."""
    count = len(out.logps)
    metrics = {
        "policy/approxkl": policy.approxkl.expand(count),
        "policy/clipfrac": policy.clipfrac.expand(count),
        "policy/ratio_mean": log_ratio.exp(),
        "policy/ratio_square": (2 * log_ratio).exp(),
        "policy/entropy": out.entropy,
        "loss/policy": _each_item(policy.loss, num_items, count),
        "loss/value": _each_item(value.loss, num_items, count),
        "value/clipfrac": value.clipfrac.expand(count),
    }
    if out.ptx_logps is not None:
        metrics["loss/ptx"] = -out.ptx_logps
    return metrics


def _each_item(loss: Tensor, num_items: float | Tensor, count: int) -> Tensor:
    """A loss that is a sum over this micro-batch divided by the step's items, as `count` observations of its mean."""
    return (loss.detach() * num_items / count).expand(count)


def set_own_rate(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float) -> None:
    """Give some of an optimizer's parameters a learning rate of their own, in groups beside those they were in."""
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        group["params"] = [p for p in group["params"] if id(p) not in own]
        if moved:
            settings = {name: setting for name, setting in group.items() if name not in ("params", "lr")}
            optimizer.add_param_group(settings | {"params": moved, "lr": rate})
