"""Reward-model maths: the Bradley–Terry loss, accuracy, and how scores are shaped before PPO sees them.

Shapes: B pairs, or replies. Scores are in reward units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from chatalign.maths.masked import at_least_fp32, require_same_shape


def bradley_terry_loss(
    chosen_scores_B: Tensor,
    rejected_scores_B: Tensor,
    *,
    margin_B: Tensor | None = None,
    center_coef: float = 0.0,
) -> Tensor:
    """−log σ(chosen − rejected − margin) + center_coef · (chosen + rejected)², per pair, shape (B,), in nats.

    The second term keeps scores near 0, which the first leaves free. Raises ValueError where the shapes differ.
    Source: Ouyang et al. (2203.02155), eq. 1; margin: Touvron et al. (2307.09288), eq. 2; centring: Eisenstein
    et al. (2312.09244), eq. 2.
    """
    require_same_shape(chosen_scores=chosen_scores_B, rejected_scores=rejected_scores_B)
    chosen_B, rejected_B = at_least_fp32(chosen_scores_B), at_least_fp32(rejected_scores_B)
    difference_B = chosen_B - rejected_B
    if margin_B is not None:
        require_same_shape(scores=chosen_B, margin=margin_B)
        difference_B = difference_B - margin_B.to(difference_B.dtype)
    losses_B = -F.logsigmoid(difference_B)
    return losses_B + center_coef * (chosen_B + rejected_B).square() if center_coef else losses_B


def pairwise_accuracy(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Share of pairs whose chosen score is strictly the higher, a detached scalar; a tie counts as wrong.

    Raises ValueError where the shapes differ.
    """
    require_same_shape(chosen_scores=chosen_scores_B, rejected_scores=rejected_scores_B)
    return (chosen_scores_B.detach() > rejected_scores_B.detach()).float().mean()


def penalise_missing_stop(score_B: Tensor, ended_B: Tensor, penalty: float) -> Tensor:
    """Scores less `penalty` (reward units, ≥ 0) where the reply ran out of length, shape (B,).

    Raises ValueError where the shapes differ or the penalty is negative.
    Source: Huang et al. (2403.17031), "EOS trick", which sets a constant score in place of subtracting.
    """
    require_same_shape(score=score_B, ended=ended_B)
    if penalty < 0:
        raise ValueError(f"penalty is {penalty}; it is subtracted, so it must not be negative")
    return torch.where(ended_B.bool(), score_B, score_B - penalty)


@dataclass
class ScoreNormaliser:
    """Running mean and standard deviation of a reward model's scores, to bring them to mean 0 and deviation 1.

    Fitted once on replies of the SFT model and stored with the reward model; JSON-able through `state_dict`.
    Source: Huang et al. (2403.17031), on reward normalisation by SFT replies.
    """

    count: int = 0
    mean: float = 0.0
    sum_of_squared_deviations: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation (divided by n); NaN before the first score."""
        return math.sqrt(self.sum_of_squared_deviations / self.count) if self.count else math.nan

    def update(self, scores_B: Tensor) -> None:
        """Takes in more scores, in place; any order and any split give the same result to rounding.

        Raises ValueError where a score is not finite. Source: Chan, Golub & LeVeque (1983).
        """
        # On the host in float64: mps has none, and scores are few.
        scores_B = scores_B.detach().flatten().cpu().double()
        if not bool(scores_B.isfinite().all()):
            raise ValueError("a score is not finite; the normaliser cannot be fitted on it")
        added = scores_B.numel()
        if added == 0:
            return
        added_mean = float(scores_B.mean())
        total, shift = self.count + added, added_mean - self.mean
        self.sum_of_squared_deviations += float((scores_B - added_mean).square().sum())
        self.sum_of_squared_deviations += shift * shift * self.count * added / total
        self.mean += shift * added / total
        self.count = total

    def normalise(self, scores_B: Tensor) -> Tensor:
        """(scores − mean) / std, shape (B,). Raises ValueError where the fitted scores do not vary."""
        if not self.std > 0:
            raise ValueError(f"std is {self.std} after {self.count} scores; fit the normaliser on varied replies")
        return (at_least_fp32(scores_B) - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        """What is stored beside the reward model."""
        return {
            "count": self.count,
            "mean": self.mean,
            "sum_of_squared_deviations": self.sum_of_squared_deviations,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores `state_dict`, in place. Raises ValueError on other keys."""
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"a score normaliser's state has the keys {sorted(self.state_dict())}; got {sorted(state)}"
            )
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self.sum_of_squared_deviations = float(state["sum_of_squared_deviations"])
