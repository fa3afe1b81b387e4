"""``normalize_reward: replies``: reward models' scores scaled by what the policy that a run starts from is paid.

That policy is the SFT model, so that its replies have mean 0 and deviation 1 under each reward model, also under one
that stores no scale of its own. Source: Huang et al. (2403.17031), on reward normalisation by SFT replies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from chatalign.engine.ppo_collect import Play
from chatalign.engine.ppo_model import PpoModel
from chatalign.engine.ppo_rewards import ModelScorer, Term
from chatalign.errors import ModelError
from chatalign.maths import ScoreNormaliser

# The mean is then known to a sixteenth of a deviation.
_REPLIES = 256
# Far from any training or evaluation seed.
_SEEDS = 2**41
Gather = Callable[[list[Any]], list[Any]]


def fit_on_replies(play: Play, model: PpoModel, prompt_rows: Any, gather: Gather) -> None:
    """Fit every reward model's scale on replies of the policy as it is, in place; every process calls it.

    `gather` joins lists of all processes. A value function that starts from a reward model is brought to the same
    units. Raises ModelError where a model's scores do not vary.
    """
    schedule, collector = play.schedule, play.collector
    own = list(range(min(_REPLIES, len(prompt_rows))))[schedule.rank :: schedule.world_size]
    drawn = own or [0]  # a process without a prompt draws with the others, and counts for nothing
    replies = collector.draw([prompt_rows[row] for row in drawn], play.sampling, [_SEEDS + row for row in drawn])
    for place, term in enumerate(collector.rewards.terms):
        if not isinstance(term.scorer, ModelScorer):
            continue
        with collector.gathered():
            own_scores = term.scorer(replies).tolist()
        scores = gather(own_scores[: len(own)])
        normaliser = ScoreNormaliser()
        normaliser.update(torch.tensor(scores))
        if not normaliser.std > 0:
            raise ModelError(
                f"reward `{term.name}` gives all {len(scores)} replies of the starting policy one score; "
                "it can't be normalised on them: set `ppo.normalize_reward: false`"
            )
        collector.rewards.terms[place] = replace(term, normaliser=normaliser)
        if model.value_origin == term.name:
            _rescale(model, term, normaliser)


def _rescale(model: PpoModel, term: Term, normaliser: ScoreNormaliser) -> None:
    """The head gives weight · score; afterwards weight · (score − mean) / std."""
    head = model.value_head
    with torch.no_grad():
        head.weight.div_(normaliser.std)
        head.bias.sub_(term.weight * normaliser.mean).div_(normaliser.std)
