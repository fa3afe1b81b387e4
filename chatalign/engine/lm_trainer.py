"""Next-token training: the objective of pretraining and of supervised fine-tuning."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from chatalign.engine.batching import Batch
from chatalign.engine.isolation import unwrapped
from chatalign.engine.loss_head import sum_of_logprobs
from chatalign.engine.trainer import Items, Metrics, StageTrainer
from chatalign.models.generation import refuse_untaught_stops

_LARGEST_EXPONENT = 80.0
_ROWS_LOOKED_AT = 256


def last_targets(rows: Any) -> list[int]:
    """The last supervised token of each of the first rows that have one."""
    first = rows[: min(len(rows), _ROWS_LOOKED_AT)]
    pairs = zip(first["input_ids"], first["supervised"], strict=True)
    targets = ([token for token, is_target in zip(*pair, strict=True) if is_target] for pair in pairs)
    return [tokens[-1] for tokens in targets if tokens]


class LmTrainer(StageTrainer):
    """Minimises −log p of the supervised tokens, the mean over all of an optimizer step's tokens, in nats a token.

    Source: Ouyang et al. (2203.02155), section 3.5 (SFT); Radford et al. (2019) for plain text.
    """

    items: ClassVar[Items] = "tokens"
    packed: ClassVar[bool] = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        generation_config = getattr(unwrapped(self.model), "generation_config", None)
        refuse_untaught_stops(last_targets(settings["train_rows"]), settings["tokenizer"], generation_config)

    def objective(  # type: ignore[override]
        self, model: nn.Module, batch: Batch, num_items: float | Tensor
    ) -> tuple[Tensor, Metrics]:
        """The summed negative log-likelihood over the step's number of targets."""
        return -sum_of_logprobs(model, batch) / num_items, {}

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Perplexity beside the loss."""
        return {**means, "perplexity": math.exp(min(means["loss"], _LARGEST_EXPONENT))}
