"""Reward modelling: the objective, and the mean and deviation of scores that are stored with the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chatalign.data.collate import collate_pairs
from chatalign.engine.batching import Batch, Bins, make_loader, to_device
from chatalign.engine.isolation import enable_segments, runs_segments, unwrapped
from chatalign.engine.sealed import SealedTrainer
from chatalign.engine.trainer import Items, Metrics, StageTrainer
from chatalign.maths.reward import ScoreNormaliser, bradley_terry_loss
from chatalign.models.heads import scores_at
from chatalign.recipe import RewardRecipe

# Enough for the mean to be known to a fiftieth of a deviation.
_NORMALISER_PAIRS = 2048


class RewardTrainer(StageTrainer):
    """Minimises −log σ(score of chosen − score of rejected), the mean over an optimizer step's pairs.

    A pair is one row, prompt | chosen | rejected; a reply's score is read at its last token, the stop token.
    Source: Ouyang et al. (2203.02155), equation 1; centring: Eisenstein et al. (2312.09244), equation 2.
    """

    items: ClassVar[Items] = "pairs"

    def objective(  # type: ignore[override]
        self, model: nn.Module, batch: Batch, num_items: float | Tensor
    ) -> tuple[Tensor, Metrics]:
        """The summed Bradley–Terry loss over the step's pairs; accuracy (a tie is wrong), margin, score moments."""
        scores = scores_at(model, batch)
        chosen_B, rejected_B = scores[0::2], scores[1::2]
        assert isinstance(self.recipe, RewardRecipe)
        losses_B = bradley_terry_loss(
            chosen_B, rejected_B, center_coef=self.recipe.reward.center_rewards_coefficient or 0.0
        )
        return losses_B.sum() / num_items, {
            "accuracy": (chosen_B > rejected_B).float(),
            "margin": chosen_B - rejected_B,
            "score_mean": scores,
            "score_square": scores.square(),
        }

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """The scores' standard deviation from their second moment."""
        square = means.pop("score_square", None)
        if square is None:
            return means
        return {**means, "score_std": math.sqrt(max(square - means["score_mean"] ** 2, 0.0))}


def store_normaliser(trainer: SealedTrainer, rows: Any) -> dict[str, Any]:
    """Fit mean and deviation of the finished model's scores on training pairs, at most 2,048 of `rows`.

    Written into the model's configuration; returns the artifact's entry. Every process calls it.
    """
    normaliser = ScoreNormaliser()
    for scores in _all_scores(trainer, Bins(rows, [[row] for row in _spread(len(rows), _NORMALISER_PAIRS)])):
        normaliser.update(scores)
    config = unwrapped(trainer.model).config
    config.score_mean, config.score_std = normaliser.mean, normaliser.std
    return {"normaliser": normaliser.state_dict()}


def _all_scores(trainer: SealedTrainer, bins: Bins) -> Iterator[Tensor]:
    args, model = trainer.args, trainer.model_wrapped
    assert isinstance(model, nn.Module)
    if not runs_segments(model):  # TRL's engine trains without it
        enable_segments(model)
    model.eval()
    size = args.per_device_eval_batch_size
    loader = make_loader(bins, collate_pairs, batch_size=size, seed=None, args=args)
    with torch.no_grad():
        for host_batch in loader:
            filler = bool(host_batch.pop("filler"))
            scores = scores_at(model, to_device(host_batch, args.device))
            # NaN marks what is no score, so that all processes gather the same shape.
            padded = scores.new_full((2 * size,), math.nan)
            if not filler:
                padded[: len(scores)] = scores
            gathered = trainer.accelerator.gather(padded)
            yield gathered[~gathered.isnan()].cpu()


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers evenly over 0 … `count` − 1."""
    return list(range(count)) if count <= wanted else [i * count // wanted for i in range(wanted)]
