"""One step of sampling: from logits to tokens and their log-probabilities.

Shapes: B rows, V vocabulary, N new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chatalign.rollout.interface import Sampling


def mixed_seed(seed: int, row_seed: int) -> int:
    """One seed from a run's and a row's, 0 to 2^63 − 1; Weyl's constants spread neighbouring ones."""
    return (seed * 0x9E3779B97F4A7C15 + row_seed * 0xBF58476D1CE4E5B9) % 2**63


def seeds_of(prompt_ids: Sequence[Sequence[int]], row_seeds: Sequence[int] | None) -> list[int]:
    """One seed a prompt; raises ValueError where a prompt is empty, or seeds and prompts differ in number."""
    seeds = list(range(len(prompt_ids))) if row_seeds is None else list(row_seeds)
    if len(seeds) != len(prompt_ids):
        raise ValueError(f"{len(seeds)} row seeds for {len(prompt_ids)} prompts; give one a prompt")
    if empty := [row for row, ids in enumerate(prompt_ids) if not len(ids)]:
        raise ValueError(f"prompt {empty[0]} has no token; a reply needs something to follow")
    return seeds


def row_uniforms(seed: int, row_seeds: Sequence[int], new_tokens: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), shape (B, N), each row from its own seed.

    Drawn on the CPU, so that a row gets the same numbers whatever device, process or batch it is in.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    uniforms_BN = torch.empty(len(row_seeds), new_tokens, dtype=torch.float64)
    generator = torch.Generator()
    for row, row_seed in enumerate(row_seeds):
        generator.manual_seed(mixed_seed(seed, row_seed))
        torch.rand(new_tokens, generator=generator, out=uniforms_BN[row])
    return uniforms_BN.to(device=device, dtype=dtype)


class Sampler:
    """Draws tokens as a `Sampling` says; holds its masks on the device."""

    def __init__(self, sampling: Sampling, vocabulary: int, device: torch.device) -> None:
        self.sampling = sampling
        # Published generation configs name stop tokens that their model doesn't have: those never come anyway.
        self.stop_ids, self.forbidden_ids = (
            torch.tensor([token for token in tokens if 0 <= token < vocabulary], dtype=torch.long, device=device)
            for tokens in (sampling.stop_token_ids, sampling.forbidden_token_ids)
        )

    def draw(self, logits_BV: Tensor, uniforms_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities before truncation, both (B,); `step` counts new tokens from 0."""
        sampling = self.sampling
        logits_BV = logits_BV.float()
        if self.forbidden_ids.numel():
            logits_BV = logits_BV.index_fill(1, self.forbidden_ids, -torch.inf)
        if sampling.temperature not in (0.0, 1.0):
            logits_BV = logits_BV / sampling.temperature
        logps_BV = logits_BV.log_softmax(-1)
        allowed_BV = logps_BV
        if step < sampling.min_new_tokens and self.stop_ids.numel():
            allowed_BV = allowed_BV.index_fill(1, self.stop_ids, -torch.inf)
        if sampling.temperature == 0.0:
            tokens_B = allowed_BV.argmax(-1)
        else:
            allowed_BV = truncate(allowed_BV, top_p=sampling.top_p, top_k=sampling.top_k)
            tokens_B = inverse_cdf(allowed_BV, uniforms_B)
        return tokens_B, logps_BV.gather(1, tokens_B[:, None]).squeeze(1)

    def stops(self, tokens: Tensor) -> Tensor:
        """Which tokens end a reply, bool, of the same shape."""
        return torch.isin(tokens, self.stop_ids)


def truncate(logps_BV: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """−inf outside the top_k likeliest tokens, then outside the smallest set whose probability reaches top_p.

    As transformers' TopKLogitsWarper and TopPLogitsWarper in that order; the likeliest token always stays.
    """
    if 0 < top_k < logps_BV.shape[-1]:
        threshold_B1 = logps_BV.topk(top_k, dim=-1).values[:, -1:]
        logps_BV = logps_BV.masked_fill(logps_BV < threshold_B1, -torch.inf)
    if top_p < 1.0:
        sorted_BV, order_BV = logps_BV.sort(dim=-1, descending=True)
        probs_BV = sorted_BV.softmax(-1)
        before_BV = running_sums_(probs_BV.clone()) - probs_BV
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p)
        logps_BV = logps_BV.masked_fill(dropped_BV, -torch.inf)
    return logps_BV


def inverse_cdf(logps_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The token at which the cumulative probability first exceeds each uniform number, shape (B,).

    One number a token in place of `multinomial`'s one a vocabulary entry, so rows can have their own streams.
    """
    # float64: in fp32 the rounding of a sum over 150,000 entries outweighs rare tokens.
    cumulative_BV = running_sums_(logps_BV.to(uniforms_B.dtype).exp_())
    # Scaled to the sum rather than normalised; strictly below it, or the last, perhaps impossible, token is drawn.
    total_B = cumulative_BV[:, -1]
    points_B = torch.minimum(uniforms_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    found_B = torch.searchsorted(cumulative_BV, points_B[:, None], right=True).squeeze(1)
    return found_B.clamp(max=logps_BV.shape[-1] - 1)  # past the end where a row is NaN, which is refused afterwards


def running_sums_(probs_BV: Tensor) -> Tensor:
    """Sums of probabilities up to each entry, in place; on a GPU under ``full_determinism`` the same at each call."""
    if probs_BV.is_cuda and torch.are_deterministic_algorithms_enabled():
        return fixed_point_sums(probs_BV)
    return probs_BV.cumsum_(-1)


def fixed_point_sums(probs_BV: Tensor) -> Tensor:
    """Sums of probabilities up to each entry, of whole multiples of 2⁻⁵²: their order doesn't matter.

    A GPU's cumsum of floats has no fixed order, and PyTorch refuses it where deterministic algorithms are asked for.
    """
    whole_BV = (probs_BV.double() * 2.0**52).long()
    return whole_BV.cumsum_(-1).double().mul_(2.0**-52).to(probs_BV.dtype)
