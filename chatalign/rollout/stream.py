"""Generation for a reader who is waiting: one reply, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from chatalign.rollout.decoding import Decoding
from chatalign.rollout.interface import Sampling
from chatalign.rollout.sampler import Sampler, row_uniforms
from chatalign.rollout.transformers_engine import evaluation_mode


def stream_reply(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], sampling: Sampling
) -> Iterator[int]:
    """The tokens of one reply as they are drawn, a stop token included; the same as `generate` gives.

    Raises ValueError where `ids` is empty.
    """
    if not len(ids):
        raise ValueError("the prompt has no token; a reply needs something to follow")
    decoding = Decoding(model, [ids], tokenizer.pad_token_id or 0)
    with evaluation_mode(model):
        logits_BV = decoding.prefill()
    sampler = Sampler(sampling, logits_BV.shape[-1], logits_BV.device)
    uniforms_BN = row_uniforms(sampling.seed, [0], sampling.max_new_tokens, logits_BV.device)
    for step in range(sampling.max_new_tokens):
        # Entered for each token, not around the loop: the caller's code runs between two tokens.
        with evaluation_mode(model):
            next_B, _ = sampler.draw(logits_BV, uniforms_BN[:, step], step)
        token = int(next_B)
        yield token
        if token in sampling.stop_token_ids:
            return
        if step + 1 < sampling.max_new_tokens:
            with evaluation_mode(model):
                logits_BV = decoding.step(next_B)
