"""Log-probabilities from hidden states, a chunk of tokens at a time, never [tokens, vocabulary] in full.

Shapes: K kept tokens, D hidden size, V vocabulary, C tokens of one chunk.

Peak memory beyond inputs and outputs is about three C × V fp32 buffers. Where only the hidden states need a
gradient (LoRA), the forward pass keeps d logp / d hidden, (K, D), and the backward pass is one product with no
recomputation: a token's incoming gradient is one number, so it can be applied afterwards. Where the weight needs
one, the backward pass recomputes the logits of those chunks whose log-probabilities the forward pass did not keep; a
sum whose weights are known beforehand (the loss of SFT) needs no such thing, since one number scales all of its
gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chatalign.maths.linear_head import (
    Gradients,
    Head,
    in_dtypes,
    log_probs_chunk,
    logprobs_chunk,
    resolve,
    softmax_chunk,
    times_logp_gradient,
)


def _entropy_gradient(head: Head, scaled_CV: Tensor, probs_CV: Tensor, lse_C: Tensor, entropy_C: Tensor) -> Tensor:
    """d H / d raw logits = −p (log p + H) · slope, (C, V)."""
    gradient_CV = scaled_CV - (lse_C - entropy_C)[:, None]
    return gradient_CV.mul_(probs_CV).neg_().mul_(head.slope(scaled_CV))


class _Options(NamedTuple):
    chunk: int
    temperature: float
    softcap: float | None
    entropy: bool
    entropy_grad: bool
    kept_chunks: int  # the first so many keep their log-probabilities for the backward pass


class _ChunkedLinearLogprobs(torch.autograd.Function):
    """See `chunked_linear_logprobs`, which resolves dtypes and autocast before it comes here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_K: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        chunk, temperature, softcap, entropy, entropy_grad, kept_chunks = options
        head = Head(weight_VD, bias_V, temperature, softcap, chunk)
        recomputes = any(ctx.needs_input_grad[1:3])
        only_hidden = ctx.needs_input_grad[0] and not recomputes
        keeps = recomputes and softcap is None and not entropy_grad  # else the logits themselves are looked at again
        logps, entropies, lses, logp_slopes, entropy_slopes = [], [], [], [], []
        kept: list[Tensor] = []
        for hidden_CD, targets_C in zip(torch.split(hidden_KD, chunk), torch.split(targets_K, chunk), strict=True):
            scaled_CV = head.scaled_logits(hidden_CD)
            if keeps and len(kept) < kept_chunks:
                log_probs_CV, logps_C, entropy_C = log_probs_chunk(scaled_CV, targets_C, entropy=entropy)
                kept.append(log_probs_CV)
                lse_C = torch.zeros_like(logps_C)  # of logits that are normalised already
            elif entropy or only_hidden:
                overwrite = not entropy and softcap is None  # else the logits are looked at again
                found = softmax_chunk(scaled_CV, targets_C, entropy=entropy, overwrite=overwrite)
                probs_CV, logps_C, entropy_C, lse_C = found
            else:
                logps_C, lse_C = logprobs_chunk(scaled_CV, targets_C)
                entropy_C = torch.zeros_like(logps_C)
            logps.append(logps_C)
            entropies.append(entropy_C)
            lses.append(lse_C)
            if only_hidden and entropy_grad:
                gradient_CV = _entropy_gradient(head, scaled_CV, probs_CV, lse_C, entropy_C)
                entropy_slopes.append(head.narrowed(gradient_CV) @ weight_VD)
            if only_hidden:
                ones_C = torch.ones_like(logps_C)
                gradient_CV = times_logp_gradient(ones_C, head.slope(scaled_CV), probs_CV, targets_C)
                logp_slopes.append(head.narrowed(gradient_CV) @ weight_VD)
        logps_K, entropy_K, lse_K = torch.cat(logps), torch.cat(entropies), torch.cat(lses)
        ctx.options, ctx.only_hidden = options, only_hidden
        if only_hidden:
            ctx.save_for_backward(torch.cat(logp_slopes), torch.cat(entropy_slopes) if entropy_grad else None)
        else:
            ctx.save_for_backward(hidden_KD, weight_VD, bias_V, targets_K, lse_K, entropy_K, *kept)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_K)
        return logps_K, entropy_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps_K: Tensor, dentropy_K: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dlogps_K.device.type, enabled=False):
            if not ctx.only_hidden:
                return (*_recomputed_gradients(ctx, dlogps_K, dentropy_K), None, None)
            logp_slopes_KD, entropy_slopes_KD = ctx.saved_tensors
            dhidden_KD = dlogps_K[:, None] * logp_slopes_KD
            if entropy_slopes_KD is not None:
                dhidden_KD += dentropy_K[:, None] * entropy_slopes_KD
            return dhidden_KD.to(logp_slopes_KD.dtype), None, None, None, None


def _recomputed_gradients(ctx: Any, dlogps_K: Tensor, dentropy_K: Tensor) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias, those that are needed; logits that were not kept are built once more."""
    hidden_KD, weight_VD, bias_V, targets_K, lse_K, entropy_K, *kept = ctx.saved_tensors
    chunk, temperature, softcap, _, entropy_grad, _ = ctx.options
    head = Head(weight_VD, bias_V, temperature, softcap, chunk)
    gradients = Gradients(head, hidden_KD, ctx.needs_input_grad[:3])
    for place, start in enumerate(range(0, hidden_KD.shape[0], chunk)):
        part = slice(start, start + chunk)
        # Kept log-probabilities are copied: the backward pass may come a second time.
        scaled_CV = head.copied(kept[place]) if place < len(kept) else head.scaled_logits(hidden_KD[part])
        from_entropy_CV = None
        slope = head.slope(scaled_CV)
        if entropy_grad:
            probs_CV = (scaled_CV - lse_K[part, None]).exp_()
            from_entropy_CV = _entropy_gradient(head, scaled_CV, probs_CV, lse_K[part], entropy_K[part])
        else:
            probs_CV = scaled_CV.sub_(lse_K[part, None]).exp_()
        gradient_CV = times_logp_gradient(dlogps_K[part], slope, probs_CV, targets_K[part])
        if from_entropy_CV is not None:
            gradient_CV.addcmul_(from_entropy_CV, dentropy_K[part, None])
        gradients.add(gradient_CV, part)
    return in_dtypes(gradients.sums(), _dtypes(hidden_KD, weight_VD, bias_V))


class _ChunkedLinearLogprobSum(torch.autograd.Function):
    """See `chunked_linear_logprob_sum`. The forward pass makes the gradients, the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_K: Tensor,
        weights_K: Tensor,
        chunk: int,
    ) -> Tensor:
        head = Head(weight_VD, bias_V, 1.0, None, chunk)
        gradients = Gradients(head, hidden_KD, ctx.needs_input_grad[:3])
        total = weights_K.new_zeros(())
        for start in range(0, hidden_KD.shape[0], chunk):
            part = slice(start, start + chunk)
            scaled_CV = head.scaled_logits(hidden_KD[part])
            if any(ctx.needs_input_grad):
                probs_CV, logps_C, _, _ = softmax_chunk(scaled_CV, targets_K[part], entropy=False, overwrite=True)
                gradients.add(times_logp_gradient(weights_K[part], 1.0, probs_CV, targets_K[part]), part)
            else:
                logps_C, _ = logprobs_chunk(scaled_CV, targets_K[part])
            total += weights_K[part] @ logps_C
        ctx.dtypes = _dtypes(hidden_KD, weight_VD, bias_V)
        ctx.save_for_backward(*gradients.sums())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        # In fp32: rounded to bf16 the one factor would bend every gradient the same way.
        scaled = [None if x is None else x * dtotal.expand_as(x) for x in ctx.saved_tensors]
        return (*in_dtypes(scaled, ctx.dtypes), None, None, None)


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if x is None else x.dtype for x in tensors]


def chunked_linear_logprobs(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_K: Tensor,
    chunk: int = 512,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
    entropy_grad: bool = False,
    softcap: float | None = None,
    kept_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies under softmax((hidden W^T + bias) / temperature), both (K,).

    In nats, in fp32 (fp64 for fp64 inputs). `chunk` tokens are projected at a time; it changes memory, never the
    result. Entropies are 0 without `entropy`, which saves passes over the logits, and carry a gradient only with
    `entropy_grad`. `softcap` s replaces a logit x by s tanh(x / s) before the temperature, as Gemma 2 does; a model's
    logit scale goes into the temperature (temperature / scale).
    Where the weight needs a gradient, whole chunks of up to `kept_tokens` tokens keep their (C, V) log-probabilities,
    in fp32, for the backward pass, which recomputes the others'; none with a softcap or an entropy gradient.
    Under autocast the projection runs in its dtype, as a linear layer would. The weight must be whole: gather it
    first where it is sharded.
    Raises ValueError where the shapes do not fit, or chunk or temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    hidden_KD, weight_VD, bias_V = resolve(hidden_KD, weight_VD, bias_V, targets_K, chunk)
    options = _Options(chunk, temperature, softcap, entropy or entropy_grad, entropy_grad, kept_tokens // chunk)
    with torch.autocast(hidden_KD.device.type, enabled=False):
        logps_K, entropy_K = _ChunkedLinearLogprobs.apply(hidden_KD, weight_VD, bias_V, targets_K, options)
    return logps_K, entropy_K


def chunked_linear_logprob_sum(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_K: Tensor,
    weights_K: Tensor,
    chunk: int = 512,
) -> Tensor:
    """Σ w · log softmax(hidden W^T + bias)[target], one number in nats; the weights (K,) get no gradient.

    What :func:`chunked_linear_logprobs` gives, summed, in a third fewer products: as the weights are known, the
    gradients are made along with the logits. Source: Hsu et al. (2410.10989), FusedLinearCrossEntropy.
    Raises ValueError where the shapes do not fit or chunk is not positive.
    """
    hidden_KD, weight_VD, bias_V = resolve(hidden_KD, weight_VD, bias_V, targets_K, chunk)
    if weights_K.shape != targets_K.shape:
        raise ValueError(f"weights {tuple(weights_K.shape)} and targets {tuple(targets_K.shape)} differ")
    weights_K = weights_K.detach().to(torch.promote_types(hidden_KD.dtype, torch.float32))
    with torch.autocast(hidden_KD.device.type, enabled=False):
        total: Tensor = _ChunkedLinearLogprobSum.apply(hidden_KD, weight_VD, bias_V, targets_K, weights_K, chunk)
    return total
