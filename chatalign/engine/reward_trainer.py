"""Reward modelling: the objective, and what is measured on the finished model's scores and stored with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chatalign.data.collate import collate_pairs
from chatalign.engine.batching import Batch, Bins, make_loader, to_device
from chatalign.engine.isolation import computes_in_half, enable_segments, runs_segments, unwrapped
from chatalign.engine.pooling import check_pooling
from chatalign.engine.sealed import SealedTrainer
from chatalign.engine.trainer import Items, Metrics, StageTrainer
from chatalign.errors import GuardError, NonFiniteError
from chatalign.maths.length import LengthBias, length_bias
from chatalign.maths.reward import ScoreNormaliser, bradley_terry_loss
from chatalign.models.heads import active_head, scores_at
from chatalign.models.score_guard import PROBE, measure_probe, refuse_low_precision
from chatalign.recipe import RewardRecipe

# Enough for the mean to be known to a fiftieth of a deviation.
_SCORED_PAIRS = 2048
# Of pairs whose chosen reply is the longer one, and of the others; and the least share of the others.
_FEWEST_OF_A_KIND = 30
_LEAST_SHORTER = 0.25


class RewardTrainer(StageTrainer):
    """Minimises −log σ(score of chosen − score of rejected), the mean over an optimizer step's pairs.

    A pair is one row, prompt | chosen | rejected; a reply's score is read at its last token, the stop token.
    Source: Ouyang et al. (2203.02155), equation 1; centring: Eisenstein et al. (2312.09244), equation 2.
    """

    items: ClassVar[Items] = "pairs"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        with self.accelerator.autocast():
            refuse_low_precision(active_head(self.model))
            check_pooling(self.model, settings["tokenizer"].eos_token_id)

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


def measure_scores(trainer: SealedTrainer, rows: Any) -> dict[str, Any]:
    """Score both replies of training pairs with the finished model, at most 2,048 of `rows`; the artifact's entries.

    ``length_bias`` is what its rankings owe to length; ``normaliser`` mean and deviation of the scores, and
    ``score_probe`` its scores of a fixed probe, both written into the model's configuration too. Every process calls
    it. Raises GuardError for a model that ranks by length, NonFiniteError for scores that are not finite.
    """
    assert isinstance(trainer.recipe, RewardRecipe)
    section, config = trainer.recipe.reward, unwrapped(trainer.model).config
    bins = Bins(rows, [[row] for row in _spread(len(rows), _SCORED_PAIRS)])
    scores, lengths = torch.cat(list(_all_scores(trainer, bins))).unbind(-1)
    if not bool(scores.isfinite().all()):
        raise NonFiniteError("a score of a training pair is not finite; lower `train.learning_rate`, or warm up longer")
    bias = length_bias(scores, lengths)
    refuse_length_bias(bias, section.max_length_bias)
    entries: dict[str, Any] = {"length_bias": bias.state_dict()}
    normaliser = ScoreNormaliser()
    normaliser.update(scores)
    if section.normalize:
        config.score_mean, config.score_std = normaliser.mean, normaliser.std
        entries["normaliser"] = normaliser.state_dict()
    half = computes_in_half(trainer.model)
    probe = measure_probe(trainer.model_wrapped, trainer.processing_class, half=half, spread=normaliser.std)
    setattr(config, PROBE, probe.state_dict())
    return entries | {PROBE: probe.state_dict()}


def refuse_length_bias(found: LengthBias, limit: float) -> None:
    """Raise GuardError where a model ranks by length pairs that don't.

    Said only where there are pairs enough of both kinds: if nearly all chosen replies are the longer ones, longer is
    what was asked for.
    """
    enough = min(found.longer, found.shorter) >= _FEWEST_OF_A_KIND
    even = found.shorter >= _LEAST_SHORTER * (found.longer + found.shorter)
    if enough and even and found.bias is not None and found.bias > limit:
        raise GuardError(
            f"the reward model ranks by length: it is right on {found.longer_accuracy:.0%} of the training pairs whose "
            f"chosen reply is the longer one and on {found.shorter_accuracy:.0%} of the others; balance the lengths in "
            "the pairs, train longer, or allow it with `reward.max_length_bias: 1`"
        )


def _all_scores(trainer: SealedTrainer, bins: Bins) -> Iterator[Tensor]:
    """Score and length of replies, (2 pairs, 2) at a time, a pair's chosen reply before its rejected one."""
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
            table = host_batch["segments"]
            replies = table[table[:, 3] > table[:, 2]]  # those with a prompt before them
            scores = scores_at(model, to_device(host_batch, args.device))
            # NaN marks what is no score, so that all processes gather the same shape.
            padded = scores.new_full((2 * size, 2), math.nan)
            if not filler:
                padded[: len(scores), 0] = scores
                padded[: len(scores), 1] = (replies[:, 1] - replies[:, 0]).to(scores)
            gathered = trainer.accelerator.gather(padded)
            yield gathered[~gathered[:, 1].isnan()].cpu()


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers evenly over 0 … `count` − 1."""
    return list(range(count)) if count <= wanted else [i * count // wanted for i in range(wanted)]
