"""From scores to advantages: the response mask, per-token rewards, generalised advantage estimation.

Shapes: B batch (one reply a row), T response tokens. Masks are bool, true at the tokens of the reply.
Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chatalign.maths.masked import at_least_fp32, require_same_shape


def response_mask(
    response_ids_BT: Tensor, stop_ids: Sequence[int], lengths_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which tokens are the reply, through its first stop token inclusive (B, T), and which replies ended (B,).

    `lengths_B` is how many tokens were really generated, where rows are padded for another reason than a stop
    token; without it a row is taken to run until a stop token or the last column.
    Raises ValueError where the shapes do not fit. Source: Huang et al. (2403.17031), on truncation at EOS.
    """
    if response_ids_BT.dim() != 2:
        raise ValueError(f"response_ids has shape {tuple(response_ids_BT.shape)}; expected (B, T)")
    batch, length = response_ids_BT.shape
    generated_BT = torch.ones_like(response_ids_BT, dtype=torch.bool)
    if lengths_B is not None:
        if lengths_B.shape != (batch,):
            raise ValueError(f"lengths has shape {tuple(lengths_B.shape)}; expected ({batch},)")
        generated_BT = torch.arange(length, device=response_ids_BT.device) < lengths_B[:, None]
    stops = torch.tensor(list(stop_ids), dtype=response_ids_BT.dtype, device=response_ids_BT.device)
    # Through the stop token: pad is often EOS, so ids != pad would drop the stop token and its reward.
    is_stop_BT = torch.isin(response_ids_BT, stops) & generated_BT
    stops_before_BT = is_stop_BT.cumsum(dim=1) - is_stop_BT.long()
    return generated_BT & (stops_before_BT == 0), is_stop_BT.any(dim=1)


def token_rewards(score_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """Per-token reward −kl_coef · KL, plus the score at the last response token, shape (B, T), 0 off the mask.

    `kl_BT` is the per-token log π_old − log π_ref in nats; the score is in reward units.
    Raises ValueError where the shapes differ or a row has no response token, so that its score would be lost.
    Source: Ouyang et al. (2203.02155), eq. 2.
    """
    require_same_shape(kl=kl_BT, mask=mask_BT)
    if score_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"score has shape {tuple(score_B.shape)}; expected ({mask_BT.shape[0]},)")
    mask_BT = mask_BT.bool()
    if not bool(mask_BT.any(dim=1).all()):
        empty_row = int((~mask_BT.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {empty_row} has no response token, so its score has no place; drop the row")
    rewards_BT = torch.where(mask_BT, -kl_coef * at_least_fp32(kl_BT.detach()), 0.0)
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (positions_T * mask_BT).argmax(dim=1, keepdim=True)
    return rewards_BT.scatter_add(1, last_B, score_B.detach().to(rewards_BT.dtype)[:, None])


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    gamma: float,
    lam: float,
    bootstrap_values_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantages + values), both (B, T), 0 off the mask.

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γ λ A_{t+1}, over response tokens only: a token off the mask is
    skipped, not discounted. `values_BT[:, t]` is the value of the state in which token t is chosen.
    After the last token V is 0, right for a reply that ended. For one cut by length pass the value of the state
    after its last token in `bootstrap_values_B`, and 0 in the rows that ended.
    Raises ValueError where the shapes differ. Source: Schulman et al. (1506.02438), eq. 16.
    """
    require_same_shape(rewards=rewards_BT, values=values_BT, mask=mask_BT)
    if bootstrap_values_B is not None and bootstrap_values_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"bootstrap_values has shape {tuple(bootstrap_values_B.shape)}; expected (B,)")
    mask_BT = mask_BT.bool()
    rewards_BT, values_BT = at_least_fp32(rewards_BT.detach()), at_least_fp32(values_BT.detach())
    next_value_B = torch.zeros_like(values_BT[:, 0])
    if bootstrap_values_B is not None:
        next_value_B = bootstrap_values_B.detach().to(values_BT.dtype)
    next_advantage_B = torch.zeros_like(next_value_B)
    advantages_BT = torch.zeros_like(values_BT)
    for t in reversed(range(values_BT.shape[1])):
        kept_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = torch.where(kept_B, delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(kept_B, values_BT[:, t], next_value_B)
        advantages_BT[:, t] = torch.where(kept_B, next_advantage_B, 0.0)
    returns_BT = torch.where(mask_BT, advantages_BT + values_BT, 0.0)
    return advantages_BT, returns_BT
