"""Next-token training: the objective of pretraining and of supervised fine-tuning."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from chatalign.engine.batching import Batch
from chatalign.engine.loss_head import sum_of_logprobs
from chatalign.engine.trainer import Items, Metrics, StageTrainer

_LARGEST_EXPONENT = 80.0


class LmTrainer(StageTrainer):
    """Minimises −log p of the supervised tokens, the mean over all of an optimizer step's tokens, in nats a token.

    Source: Ouyang et al. (2203.02155), section 3.5 (SFT); Radford et al. (2019) for plain text.
    """

    items: ClassVar[Items] = "tokens"
    packed: ClassVar[bool] = True

    def objective(  # type: ignore[override]
        self, model: nn.Module, batch: Batch, num_items: float | Tensor
    ) -> tuple[Tensor, Metrics]:
        """The summed negative log-likelihood over the step's number of targets."""
        return -sum_of_logprobs(model, batch) / num_items, {}

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Perplexity beside the loss."""
        return {**means, "perplexity": math.exp(min(means["loss"], _LARGEST_EXPONENT))}
