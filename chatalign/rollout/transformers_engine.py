"""Generation with a transformers model: a lean decode loop on transformers' own cache classes.

Against `generate` it keeps the log-probabilities of the sampled tokens, drops finished rows, sorts prompts by
length, and builds no mask or processor list a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from chatalign.errors import NonFiniteError
from chatalign.rollout.decoding import Decoding
from chatalign.rollout.dense import dense_weights
from chatalign.rollout.interface import Rollout, Sampling
from chatalign.rollout.sampler import Sampler, row_uniforms, seeds_of

# Finished rows are dropped once they are this share of the batch.
_FINISHED_SHARE = 0.05
# On an accelerator, asking which rows are finished waits for the device, so it is asked now and then only.
_STEPS_BETWEEN_LOOKS = 8


class TransformersRollout:
    """`RolloutEngine` on a transformers (or PEFT) causal language model, in evaluation mode and without gradients."""

    def __init__(self, model: nn.Module, pad_token_id: int, *, batch_size: int = 64) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, *, row_seeds: Sequence[int] | None = None
    ) -> Rollout:
        """One reply a prompt, in the prompts' order; see `RolloutEngine.generate`.

        Raises ValueError where a prompt is empty, or seeds and prompts differ in number.
        """
        seeds = seeds_of(prompt_ids, row_seeds)
        order = sorted(range(len(prompt_ids)), key=lambda row: (len(prompt_ids[row]), row))
        response_ids: list[list[int]] = [[] for _ in order]
        logprobs: list[list[float]] = [[] for _ in order]
        ended = [False for _ in order]
        with evaluation_mode(self.model), dense_weights(self.model):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                tokens, logps, stopped = self._generate_chunk(
                    [prompt_ids[row] for row in rows], sampling, [seeds[row] for row in rows]
                )
                for row, ids, values, stop in zip(rows, tokens, logps, stopped, strict=True):
                    response_ids[row], logprobs[row], ended[row] = ids, values, stop
        return Rollout(response_ids=response_ids, logprobs=logprobs, ended=ended)

    def _generate_chunk(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        decoding = Decoding(self.model, prompt_ids, self.pad_token_id)
        logits_BV = decoding.prefill()
        device, n, limit = logits_BV.device, len(prompt_ids), sampling.max_new_tokens
        sampler = Sampler(sampling, logits_BV.shape[-1], device)
        uniforms_BN = row_uniforms(sampling.seed, seeds, limit, device)
        tokens_BN = torch.full((n, limit), self.pad_token_id, device=device)
        logps_BN = torch.zeros(n, limit, device=device)
        alive_B = torch.arange(n, device=device)  # the original row of each row still in the batch
        stopped_B = torch.zeros(n, dtype=torch.bool, device=device)
        look_every = 1 if device.type == "cpu" else _STEPS_BETWEEN_LOOKS
        for step in range(limit):
            next_B, next_logps_B = sampler.draw(logits_BV, uniforms_BN[alive_B, step], step)
            tokens_BN[alive_B, step], logps_BN[alive_B, step] = next_B, next_logps_B
            stopped_B = stopped_B | sampler.stops(next_B)
            if step + 1 == limit:
                break
            if (step + 1) % look_every == 0:
                finished = int(stopped_B.sum())
                if finished == len(stopped_B):
                    break
                if finished > _FINISHED_SHARE * len(stopped_B):
                    rows = filled_from_the_end(stopped_B, len(stopped_B) - finished)
                    decoding.keep(rows)
                    alive_B, next_B, stopped_B = alive_B[rows], next_B[rows], stopped_B[rows]
            logits_BV = decoding.step(next_B)
        refuse_nan(logps_BN[:, : step + 1], [len(ids) for ids in prompt_ids])
        return cut_at_stops(tokens_BN[:, : step + 1], logps_BN[:, : step + 1], sampler)


def refuse_nan(logps_BN: Tensor, lengths: Sequence[int]) -> None:
    """Raise NonFiniteError where log-probabilities of rows that began with `lengths` prompt tokens are NaN."""
    is_nan_B = logps_BN.isnan().any(1)
    if not bool(is_nan_B.any()):
        return
    row, widest = int(is_nan_B.int().argmax()), max(lengths)
    pads = widest - lengths[row]
    mend = (
        "its weights are not finite" if min(lengths) == widest else "generate with a batch size of 1, without padding"
    )
    raise NonFiniteError(
        f"the model's log-probabilities are NaN for a prompt of {lengths[row]} tokens, with {pads} pad tokens before "
        f"it and others of up to {widest} beside it; {mend}"
    )


def filled_from_the_end(stopped_B: Tensor, kept: int) -> Tensor:
    """Rows to go on with, (kept,): each finished row's place is taken by a living one from the end.

    Few rows move, so few are copied in the cache.
    """
    rows = torch.arange(kept, device=stopped_B.device)
    rows[stopped_B[:kept]] = (~stopped_B[kept:]).nonzero().squeeze(1) + kept
    return rows


def cut_at_stops(
    tokens_BN: Tensor, logps_BN: Tensor, sampler: Sampler
) -> tuple[list[list[int]], list[list[float]], list[bool]]:
    """Each row through its first stop token, which belongs to the reply, and whether it has one."""
    # By place, not by `ids != pad`: pad may be the stop token, and a dropped row is padded with it.
    is_stop_BN = sampler.stops(tokens_BN)
    ended = is_stop_BN.any(1).tolist()
    firsts = is_stop_BN.int().argmax(1).tolist()
    lengths = [first + 1 if end else tokens_BN.shape[1] for first, end in zip(firsts, ended, strict=True)]
    tokens = [row[:length] for row, length in zip(tokens_BN.tolist(), lengths, strict=True)]
    logps = [row[:length] for row, length in zip(logps_BN.tolist(), lengths, strict=True)]
    return tokens, logps, ended


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; the training flag of every module is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
