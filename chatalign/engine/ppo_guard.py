"""What PPO promises of its replies, rewards and log-probabilities, held in every run: rows 34, 35 and 40 to 45 of
docs/guard.md.

All of it is on numbers that a rollout has anyway, but for a forward pass or two in a run's first step.
Shapes: B replies, T response tokens of the longest, K response tokens of all replies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatalign.errors import GuardError
from chatalign.maths import kl_exact, policy_loss, sampler_excess
from chatalign.maths.gae import token_rewards
from chatalign.maths.value import explained_variance
from chatalign.models.reference import WRONG_REFERENCE
from chatalign.rollout import Rollout, Sampling

_REPORT = "install the versions of constraints.txt, or report it with what chatalign env prints"


class Limits(NamedTuple):
    """Up to where two computations of one number differ by rounding, in nats a token."""

    gap: float  # sampler and trainer
    reference: float  # policy and reference before the first update
    repeat: float  # two passes over one batch

    def at(self, temperature: float) -> Limits:
        """The limits of log-probabilities at this temperature, in which logits and their rounding count 1/T times."""
        return Limits(*(limit / min(temperature, 1.0) for limit in self))


FULL_PRECISION = Limits(gap=0.02, reference=5e-3, repeat=1e-5)
# bf16 kernels of two engines, or of two batches, differ by a few times less; another temperature by more.
HALF_PRECISION = Limits(gap=0.1, reference=5e-2, repeat=1e-3)


def refuse_other_gradient(name: str, estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Raise GuardError where paying −`estimator` a token doesn't push the policy down the KL's gradient.

    The expected update over a vocabulary of three tokens, by the functions that a run trains with, against the exact
    gradient. k2 and k3 have the KL's size and not its gradient, once they are a reward: ½ log²r is flat at r = 1.
    """
    logits_V = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    reference_V = torch.tensor([0.1, 0.4, -0.6])
    (exact_V,) = torch.autograd.grad(kl_exact(logits_V[None], reference_V[None]).sum(), logits_V)
    logps_B1 = logits_V.log_softmax(-1)[:, None]
    old_B1 = logps_B1.detach()
    everything_B1 = torch.ones_like(old_B1, dtype=torch.bool)
    kl_B1 = estimator(old_B1, reference_V.log_softmax(-1)[:, None])
    rewards_B1 = token_rewards(torch.zeros(3), kl_B1, everything_B1, 1.0)
    loss = policy_loss(
        logps_BT=logps_B1,
        old_logps_BT=old_B1,
        advantages_BT=rewards_B1,
        mask_BT=everything_B1,
        normaliser=1.0,
        importance_weights_BT=old_B1.exp(),  # each token as often as the policy draws it
    ).loss
    (found_V,) = torch.autograd.grad(loss, logits_V)
    cosine = float(torch.cosine_similarity(found_V, exact_V, dim=0))
    if not cosine > 0.999:
        raise GuardError(
            f"ppo.kl_estimator: {name} as a penalty has another gradient than the KL (cosine {cosine:.3f} on three "
            f"tokens), so that it would not hold the policy; set k1"
        )


def refuse_other_sampling(*, drawn: float, trained: float) -> None:
    """Raise GuardError where replies are drawn at one temperature and their log-probabilities are of another."""
    if drawn != trained:
        raise _other_distribution(f"temperature {drawn:g} and {trained:g}")


def _other_distribution(how: str) -> GuardError:
    return GuardError(
        f"replies are drawn from another distribution than the one that is trained ({how}), so that every ratio would "
        f"be wrong; give sampler and trainer one temperature, top-p and set of tokens"
    )


def refuse_gap(logps_K: Tensor, sampled_K: Tensor, limit: float) -> None:
    """Raise GuardError where the trainer's log-probabilities, before any update, aren't the sampler's.

    A sampler whose numbers are of what was left after top-p or top-k has them all too high: its mean ratio is below 1.
    """
    log_ratio_K = logps_K.double() - sampled_K.double()
    gap = float(log_ratio_K.abs().mean())
    if not gap > limit:  # a NaN is the trainer's to name
        return
    if bool((log_ratio_K <= 0).all()):
        raise _other_distribution(f"mean ratio {float(log_ratio_K.exp().mean()):.3f} before any update")
    raise _gap(gap, limit, "the model computes something else with a cache than without: use another model")


def refuse_other_engine(logps_K: Tensor, sampled_K: Tensor, lengths: Sequence[int], sampling: Sampling) -> None:
    """The same for vLLM, whose log-probabilities are of what it drew from.

    Top-p, top-k and the minimum length may make them greater, as far as `sampler_excess` allows.
    """
    steps = torch.cat([torch.arange(length) for length in lengths])
    free = torch.full_like(sampled_K, torch.inf if sampling.top_k else -math.log(sampling.top_p))
    allowed = torch.where(steps < sampling.min_new_tokens, torch.inf, free)
    gap = float(sampler_excess(logps_K, sampled_K, allowed).mean())
    if gap > HALF_PRECISION.gap:
        raise _gap(
            gap,
            HALF_PRECISION.gap,
            "start vLLM with --logprobs-mode processed_logprobs, on the base that the recipe's model hangs on, "
            "in its dtype",
        )


def _gap(gap: float, limit: float, mend: str) -> GuardError:
    return GuardError(
        f"sampler and trainer differ by {gap:.3f} nats a token before any update, more than the {limit:.3g} of "
        f"rounding; {mend}"
    )


def refuse_noise(first_K: Tensor, second_K: Tensor, limit: float) -> None:
    """Raise GuardError where two passes over one batch, in the mode that it trains in, give other log-probabilities."""
    gap = float((first_K - second_K).abs().mean())
    if gap > limit:
        raise GuardError(
            f"two passes over one batch differ by {gap:.2g} nats a token: dropout is on while PPO trains, and its "
            f"ratios would be noise; set every dropout of the model's config.json to 0"
        )


def refuse_other_pass(logps_K: Tensor, old_logps_K: Tensor, limit: float) -> None:
    """Raise GuardError where the update's log-probabilities, before any update, aren't those of the rollout."""
    gap = float((logps_K - old_logps_K).abs().mean())
    if gap > limit:
        raise GuardError(
            f"rollout and update of one policy differ by {gap:.3f} nats a token before any update: another adapter or "
            f"precision runs in one of them; {_REPORT}"
        )


def refuse_other_reference(logps_K: Tensor, ref_logps_K: Tensor, limit: float) -> None:
    """Raise GuardError where policy and reference differ in the first rollout, whose KL is 0."""
    gap = float((logps_K - ref_logps_K).abs().mean())
    if gap > limit:
        raise GuardError(
            f"{WRONG_REFERENCE}: before the first step the two differ by {gap:.2g} nats a token; give the model that "
            f"SFT made as model.name_or_path"
        )


def refuse_wrong_ends(rollout: Rollout, sampling: Sampling) -> None:
    """Raise GuardError where a reply has no token, goes on after a stop token, or is said to end and doesn't.

    ``missing_eos_penalty`` and the value after the last token follow from what the engine says here.
    """
    stops = set(sampling.stop_token_ids)
    for row, (ids, ended) in enumerate(zip(rollout.response_ids, rollout.ended, strict=True)):
        if not ids:
            raise _unpaid(row, "it has no token to be paid on")
        if (ids[-1] in stops) != ended:
            is_stop = "a stop token" if ids[-1] in stops else "no stop token"
            raise _unpaid(row, f"it counts as {'ended' if ended else 'cut'}, and its last token {ids[-1]} is {is_stop}")
        if not stops.isdisjoint(ids[:-1]):
            raise _unpaid(row, "it goes on after a stop token")


def refuse_lost_scores(rewards_BT: Tensor, kl_BT: Tensor, mask_BT: Tensor, score_B: Tensor, kl_coef: float) -> None:
    """Raise GuardError where a reply's rewards less its KL penalty aren't its score, all of it on its last token."""
    paid_BT = torch.where(mask_BT, rewards_BT + kl_coef * kl_BT, 0.0)
    last_B1 = mask_BT.sum(1, keepdim=True) - 1
    allowed_B = 1e-4 * (1 + score_B.abs() + kl_coef * torch.where(mask_BT, kl_BT, 0.0).abs().sum(1))
    for at_B, where in ((paid_BT.gather(1, last_B1)[:, 0], "its last token"), (paid_BT.sum(1), "all its tokens")):
        wrong_B = ~((at_B - score_B).abs() <= allowed_B)
        if bool(wrong_B.any()):
            row = int(wrong_B.nonzero()[0])
            raise _unpaid(row, f"{where} got {float(at_B[row]):.4g} of a score of {float(score_B[row]):.4g}")


def _unpaid(row: int, what: str) -> GuardError:
    return GuardError(f"reply {row} of a rollout is not paid for what it is: {what}; {_REPORT}")


def refuse_values(values_K: Tensor, returns_K: Tensor) -> None:
    """Raise GuardError where a value function that starts from nothing isn't V = 0 in the first rollout."""
    largest = float(values_K.abs().max())
    if largest != 0:
        everything = torch.ones_like(values_K, dtype=torch.bool)
        explained = float(explained_variance(values_K, returns_K, everything))
        raise GuardError(
            f"the value function starts at up to {largest:.2g} in place of 0 (explained variance {explained:.2f}), so "
            f"that advantages would be its noise; {_REPORT}"
        )


class RatioGuard(TrainerCallback):
    """Holds π / π_old to 1 before each rollout's first update, and two passes over a run's first batch to be equal."""

    def __init__(self, limits: Limits, *, own_logps: bool) -> None:
        self.limits = limits
        self.own_logps = own_logps  # π_old is the trainer's own, not the sampler's
        self._still = False
        self._fresh: list[tuple[Tensor, Tensor]] = []

    def hold_still(self, forward: Callable[[], Tensor]) -> None:
        """In a run's first micro-batch: `forward` gives its log-probabilities (K,); not called again afterwards."""
        if not self._still:
            refuse_noise(forward(), forward(), self.limits.repeat)
            # With what these passes rounded in autocast's cache, FSDP2 under bf16 trains to other weights.
            torch.clear_autocast_cache()
            self._still = True

    def note(self, logps_K: Tensor, old_logps_K: Tensor) -> None:
        """A micro-batch of a rollout's first step."""
        self._fresh.append((logps_K, old_logps_K))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """All micro-batches of the step are in, and nothing is updated yet."""
        if self._fresh:
            logps_K, old_logps_K = (torch.cat(parts) for parts in zip(*self._fresh, strict=True))
            self._fresh.clear()
            (refuse_other_pass if self.own_logps else refuse_gap)(logps_K, old_logps_K, self.limits.gap)
