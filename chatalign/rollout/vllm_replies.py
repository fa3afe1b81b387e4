"""What vLLM is asked for and what its replies must be, served or in this process.

Field names are those of ``/v1/completions`` and of ``vllm.SamplingParams``, which share them (documentation of
vLLM 0.22 to 0.28).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chatalign.errors import RolloutError
from chatalign.rollout.interface import Rollout, Sampling
from chatalign.rollout.sampler import mixed_seed

# The least that vLLM takes (it clamps to ±100): a probability of e^−100, without a list of the whole vocabulary.
_BAN = -100.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One reply as vLLM gave it."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None


def sampling_fields(sampling: Sampling, row_seed: int, *, vocabulary: int) -> dict[str, Any]:
    """The request's fields for one reply.

    Everything that shapes the draw is named, since a server takes what isn't from the model's generation config.
    ``ignore_eos`` leaves stopping to ``stop_token_ids`` alone. Tokens that the model doesn't have never come, and
    vLLM refuses them in ``logit_bias``.
    """
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop_token_ids": [token for token in sampling.stop_token_ids if 0 <= token < vocabulary],
        "ignore_eos": True,
        "logit_bias": {token: _BAN for token in sampling.forbidden_token_ids if 0 <= token < vocabulary},
        "seed": mixed_seed(sampling.seed, row_seed),
        "logprobs": 0,  # the sampled token's alone
    }


def rollout_of(replies: Sequence[Reply], sampling: Sampling) -> Rollout:
    """Replies as a `Rollout`; raises RolloutError where one isn't what was asked for."""
    for row, reply in enumerate(replies):
        if problem := _problem(reply, sampling):
            raise RolloutError(f"vLLM's reply {row} {problem}")
    return Rollout(
        response_ids=[reply.token_ids for reply in replies],
        logprobs=[reply.logprobs for reply in replies],
        # By the token: vLLM says "length" where a stop token is also the last that was allowed.
        ended=[reply.token_ids[-1] in sampling.stop_token_ids for reply in replies],
    )


def _problem(reply: Reply, sampling: Sampling) -> str | None:
    """What is wrong with a reply and how to mend it, or None."""
    ids, stops = reply.token_ids, set(sampling.stop_token_ids)
    if reply.finish_reason not in ("stop", "length"):
        return f"finished by {reply.finish_reason!r}, neither stop nor length; look at vLLM's log"
    if not ids or len(ids) > sampling.max_new_tokens:
        return f"has {len(ids)} tokens where 1 to {sampling.max_new_tokens} were asked for; use vLLM 0.22 or later"
    if len(reply.logprobs) != len(ids):
        return f"has {len(reply.logprobs)} log-probabilities for {len(ids)} tokens; use vLLM 0.22 or later"
    if not all(math.isfinite(logprob) and logprob <= 1e-4 for logprob in reply.logprobs):
        return "has a value that is no log-probability; start vLLM with --logprobs-mode processed_logprobs"
    if banned := set(ids) & set(sampling.forbidden_token_ids):
        return f"holds the banned token {min(banned)}; use a vLLM that takes `logit_bias`"
    if stops & set(ids[:-1]):
        return "goes on after a stop token; use a vLLM that takes `stop_token_ids`"
    if reply.finish_reason == "stop" and ids[-1] not in stops:
        return f"stopped at token {ids[-1]}, which isn't a stop token here; start vLLM with --generation-config vllm"
    if len(ids) < sampling.max_new_tokens and ids[-1] not in stops:
        return f"was cut after {len(ids)} tokens by a limit of vLLM's own; raise its --max-model-len"
    return None
