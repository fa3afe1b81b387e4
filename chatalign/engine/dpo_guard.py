"""The start-up check that the loss which is computed is the one that the recipe names (row 36 of docs/guard.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chatalign.errors import GuardError
from chatalign.maths.preference import PreferenceLoss
from chatalign.maths.preference_start import loss_at_start
from chatalign.recipe import DpoSection

_LENGTHS = (4.0, 5.0)


def refuse_other_loss(section: DpoSection, loss_of: Callable[[Tensor, Tensor, Tensor], PreferenceLoss]) -> None:
    """Compare `loss_of` at a margin of 0 with the recipe's loss by hand, value and slopes; raise GuardError.

    `loss_of` takes log-probabilities, the reference's, and lengths, (2B,) each.
    """
    logps_2B = torch.zeros(2, requires_grad=True)
    found_loss = loss_of(logps_2B, torch.zeros(2), torch.tensor(_LENGTHS)).losses_B.sum()
    (slopes_2B,) = torch.autograd.grad(found_loss, logps_2B)
    found = (float(found_loss.detach()), *slopes_2B.tolist())
    value, chosen, rejected = loss_at_start(
        section.loss_type,
        beta=section.beta,
        label_smoothing=section.label_smoothing,
        lengths=_LENGTHS,
    )
    wanted = (value, chosen - section.sft_weight / _LENGTHS[0], rejected)
    if any(abs(a - b) > 1e-4 * max(abs(b), 1e-3) for a, b in zip(found, wanted, strict=True)):
        numbers, expected = (", ".join(f"{x:.4g}" for x in one) for one in (found, wanted))
        raise GuardError(
            f"at a margin of 0 the loss and its slopes are {numbers}, and those of `dpo.loss_type: "
            f"{section.loss_type}` with its settings are {expected}: another loss would be minimised; take the "
            "versions of constraints.txt, and change the loss in the recipe alone"
        )
