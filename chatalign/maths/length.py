"""How much of a reward model's judgement is the replies' length.

Shapes: P pairs, 2P replies, each pair's chosen one before its rejected one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """What scores owe to length; None where there is nothing to say it by.

    ``length_gap`` is the mean of chosen − rejected in tokens. ``longer_accuracy`` is the share of right rankings (a
    tie ½) among the ``longer`` pairs whose chosen reply is the longer one, ``shorter_accuracy`` among the others.
    """

    length_gap: float
    score_length_correlation: float | None
    longer: int
    longer_accuracy: float | None
    shorter: int
    shorter_accuracy: float | None

    @property
    def bias(self) -> float | None:
        """From −1 to 1; 1 ranks by length alone, 0 is as often right whichever reply is the longer."""
        if self.longer_accuracy is None or self.shorter_accuracy is None:
            return None
        return self.longer_accuracy - self.shorter_accuracy

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def length_bias(scores_2P: Tensor, lengths_2P: Tensor) -> LengthBias:
    """The bias of scores (2P,) of replies of so many tokens (2P,); 2i is chosen i, 2i + 1 rejected i.

    Source: Singhal et al. (2310.03716), who split a reward model's accuracy by which reply is the longer.
    """
    scores_2P, lengths_2P = scores_2P.double(), lengths_2P.double()
    margins_P, gaps_P = scores_2P[0::2] - scores_2P[1::2], lengths_2P[0::2] - lengths_2P[1::2]
    right_P = (margins_P.sign() + 1) / 2
    longer_P, shorter_P = gaps_P > 0, gaps_P < 0
    return LengthBias(
        length_gap=float(gaps_P.mean()),
        score_length_correlation=_correlation(scores_2P, lengths_2P),
        longer=int(longer_P.sum()),
        longer_accuracy=float(right_P[longer_P].mean()) if longer_P.any() else None,
        shorter=int(shorter_P.sum()),
        shorter_accuracy=float(right_P[shorter_P].mean()) if shorter_P.any() else None,
    )


def _correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's; None where either doesn't vary."""
    one, other = one - one.mean(), other - other.mean()
    scale = float(one.norm() * other.norm())
    return float(one @ other) / scale if scale > 0 else None
