"""Reward modelling: the objective, and the mean and deviation of scores that are stored with the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chatalign.engine.batching import Batch, BinLoader, Bins
from chatalign.engine.isolation import unwrapped
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

    def store_normaliser(self) -> dict[str, Any]:
        """Fit the scores' normaliser, write it into the model's configuration, return the artifact's entry for it."""
        normaliser = self.fit_normaliser()
        config = unwrapped(self.model).config
        config.score_mean, config.score_std = normaliser.mean, normaliser.std
        return {"normaliser": normaliser.state_dict()}

    def fit_normaliser(self) -> ScoreNormaliser:
        """Mean and standard deviation of the model's scores over training pairs, at most 2,048, on every process."""
        rows = self.train_dataset
        assert isinstance(rows, Bins)
        sample = Bins(rows.rows, _spread(rows.bins, _NORMALISER_PAIRS))
        normaliser = ScoreNormaliser()
        for scores in self._scores(self.get_eval_dataloader(sample)):
            normaliser.update(scores)
        return normaliser

    def _scores(self, loader: BinLoader) -> list[Tensor]:
        model = self.model_wrapped
        assert isinstance(model, nn.Module)
        training = model.training
        model.eval()
        found = []
        with torch.no_grad():
            for host_batch in loader:
                filler = bool(host_batch.pop("filler"))
                scores = scores_at(model, self._prepare_inputs(host_batch))
                # NaN marks what is no score, so that all processes gather the same shape.
                padded = scores.new_full((2 * self.args.per_device_eval_batch_size,), math.nan)
                if not filler:
                    padded[: len(scores)] = scores
                gathered = self.accelerator.gather(padded)
                found.append(gathered[~gathered.isnan()].cpu())
        model.train(training)
        return found


def _spread(bins: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
    """`count` bins evenly over all of them."""
    if len(bins) <= count:
        return bins
    return [bins[i * len(bins) // count] for i in range(count)]
