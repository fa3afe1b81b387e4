"""The value's side of PPO: clipped value loss and how much of the returns the values explain.

Shapes: B batch, T response tokens; every function takes any one shape, a flat (K,) included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chatalign.maths.masked import at_least_fp32, masked_mean, masked_var, require_same_shape
from chatalign.maths.policy import normalised_sum


class ValueLoss(NamedTuple):
    """Scalars. `loss` carries the gradient, `clipfrac` is a detached mean over the mask."""

    loss: Tensor
    clipfrac: Tensor  # share of tokens whose clipped error is the one in the loss


def value_loss(
    *,
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float | None = 0.2,
    normaliser: Tensor | float | None = None,
) -> ValueLoss:
    """Mean over tokens of ½ max((V − R)², (V_clip − R)²), V_clip within `clip_range` of the rollout's value.

    None does not clip. `normaliser` replaces the mask's token count. Only `values_BT` receives a gradient.
    Raises ValueError where the shapes differ. Source: Huang et al. (2403.17031), on value clipping.
    """
    require_same_shape(values=values_BT, old_values=old_values_BT, returns=returns_BT, mask=mask_BT)
    mask_BT = mask_BT.bool()
    # Emptied off the mask first, so that what stands there cannot reach a gradient.
    values_BT = torch.where(mask_BT, at_least_fp32(values_BT), 0.0)
    old_values_BT = torch.where(mask_BT, at_least_fp32(old_values_BT.detach()), 0.0)
    returns_BT = torch.where(mask_BT, at_least_fp32(returns_BT.detach()), 0.0)
    errors_BT = (values_BT - returns_BT).square()
    if clip_range is None:
        loss = 0.5 * normalised_sum(errors_BT, mask_BT, normaliser)
        return ValueLoss(loss=loss, clipfrac=torch.zeros_like(loss.detach()))
    clipped_values_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range, clip_range)
    clipped_errors_BT = (clipped_values_BT - returns_BT).square()
    loss = 0.5 * normalised_sum(torch.maximum(errors_BT, clipped_errors_BT), mask_BT, normaliser)
    clipfrac = masked_mean((clipped_errors_BT > errors_BT).float(), mask_BT)
    return ValueLoss(loss=loss, clipfrac=clipfrac)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns) over the mask, a detached scalar; 1 is perfect, 0 a constant's.

    NaN where the returns do not vary, since there is nothing to explain. Raises ValueError where the shapes differ.
    """
    require_same_shape(values=values_BT, returns=returns_BT, mask=mask_BT)
    values_BT, returns_BT = at_least_fp32(values_BT.detach()), at_least_fp32(returns_BT.detach())
    returns_var = masked_var(returns_BT, mask_BT)
    ratio = masked_var(returns_BT - values_BT, mask_BT) / returns_var
    return torch.where(returns_var > 0, 1 - ratio, torch.nan)
