"""The loss head: hidden states to log-probabilities, a chunk of tokens at a time, never [tokens, vocabulary] in full.

Shapes: K kept tokens, D hidden size, V vocabulary, C tokens of one chunk.

Peak memory beyond inputs and outputs is about three C × V fp32 buffers. Where only the hidden states need a
gradient (LoRA), the forward pass keeps d logp / d hidden, (K, D), and the backward pass is one product with no
recomputation: a token's incoming gradient is one number, so it can be applied afterwards. Where the weight needs
one, the backward pass recomputes each chunk's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def _mm_wide(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, returned in fp32 (fp64 for fp64)."""
    if left.dtype in _LOW_PRECISION and left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    product = left @ right
    return product.float() if product.dtype in _LOW_PRECISION else product


@dataclass(frozen=True)
class _Head:
    """The projection as it stands in one call: z = squash(hidden W^T + bias) / temperature."""

    weight_VD: Tensor
    bias_V: Tensor | None
    temperature: float
    softcap: float | None

    def scaled_logits(self, hidden_CD: Tensor) -> Tensor:
        """Logits over temperature in fp32, (C, V), in a buffer that the caller may overwrite."""
        logits_CV = _mm_wide(hidden_CD, self.weight_VD.t())
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV if self.temperature == 1 else logits_CV.div_(self.temperature)

    def slope(self, scaled_CV: Tensor) -> Tensor | float:
        """d (scaled logit) / d (raw logit): 1 / temperature, less where the softcap bends."""
        if self.softcap is None:
            return 1 / self.temperature
        squashed_CV = scaled_CV * (self.temperature / self.softcap)
        return squashed_CV.square_().neg_().add_(1).div_(self.temperature)


def _softmax_chunk(scaled_CV: Tensor, targets_C: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities (C, V), and log-probabilities of the targets, entropies (or 0) and log-normalisers, each (C,)."""
    largest_C = scaled_CV.amax(-1)
    # By hand: one exp serves the normaliser, the entropy and the gradient.
    probs_CV = (scaled_CV - largest_C[:, None]).exp_()
    total_C = probs_CV.sum(-1)
    probs_CV.div_(total_C[:, None])
    lse_C = largest_C + total_C.log()
    logps_C = scaled_CV.gather(-1, targets_C[:, None]).squeeze(-1) - lse_C
    entropy_C = lse_C - torch.linalg.vecdot(probs_CV, scaled_CV) if entropy else torch.zeros_like(lse_C)
    return probs_CV, logps_C, entropy_C, lse_C


def _logprobs_chunk(scaled_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and log-normalisers, each (C,), in one fused pass: without the entropy."""
    # Out of range a target raises; the default would pass over −100.
    logps_C = -cross_entropy(scaled_CV, targets_C, reduction="none", ignore_index=torch.iinfo(torch.int64).min)
    return logps_C, scaled_CV.gather(-1, targets_C[:, None]).squeeze(-1) - logps_C


def _entropy_gradient(head: _Head, scaled_CV: Tensor, probs_CV: Tensor, lse_C: Tensor, entropy_C: Tensor) -> Tensor:
    """d H / d raw logits = −p (log p + H) · slope, (C, V)."""
    gradient_CV = scaled_CV - (lse_C - entropy_C)[:, None]
    return gradient_CV.mul_(probs_CV).neg_().mul_(head.slope(scaled_CV))


def _logp_gradient(head: _Head, scaled_CV: Tensor, probs_CV: Tensor, targets_C: Tensor) -> Tensor:
    """d logp / d raw logits = (1[target] − p) · slope, (C, V), in the buffer of the probabilities."""
    slope = head.slope(scaled_CV)
    gradient_CV = _times_target_minus_probs(probs_CV, targets_C, torch.ones_like(probs_CV[:, 0]))
    return gradient_CV if isinstance(slope, float) and slope == 1 else gradient_CV.mul_(slope)


def _times_target_minus_probs(probs_CV: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
    """w · (1[target] − p), (C, V), in the buffer of the probabilities, in one pass."""
    gradient_CV = probs_CV.mul_(-weights_C[:, None])
    # The target's 1 joins in fp32, before any rounding to bf16: where p is near 1 the difference is what is left.
    return gradient_CV.scatter_add_(-1, targets_C[:, None], weights_C[:, None])


class _ChunkedLinearLogprobs(torch.autograd.Function):
    """See `chunked_linear_logprobs`, which resolves dtypes and autocast before it comes here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_K: Tensor,
        options: tuple[int, float, float | None, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        chunk, temperature, softcap, entropy, entropy_grad = options
        head = _Head(weight_VD, bias_V, temperature, softcap)
        only_hidden = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        logps, entropies, lses, logp_slopes, entropy_slopes = [], [], [], [], []
        for hidden_CD, targets_C in zip(torch.split(hidden_KD, chunk), torch.split(targets_K, chunk), strict=True):
            scaled_CV = head.scaled_logits(hidden_CD)
            if entropy or only_hidden:
                probs_CV, logps_C, entropy_C, lse_C = _softmax_chunk(scaled_CV, targets_C, entropy=entropy)
            else:
                logps_C, lse_C = _logprobs_chunk(scaled_CV, targets_C)
                entropy_C = torch.zeros_like(logps_C)
            logps.append(logps_C)
            entropies.append(entropy_C)
            lses.append(lse_C)
            if only_hidden and entropy_grad:
                gradient_CV = _entropy_gradient(head, scaled_CV, probs_CV, lse_C, entropy_C)
                entropy_slopes.append(gradient_CV.to(weight_VD.dtype) @ weight_VD)
            if only_hidden:
                gradient_CV = _logp_gradient(head, scaled_CV, probs_CV, targets_C)
                logp_slopes.append(gradient_CV.to(weight_VD.dtype) @ weight_VD)
        logps_K, entropy_K, lse_K = torch.cat(logps), torch.cat(entropies), torch.cat(lses)
        ctx.options, ctx.only_hidden = options, only_hidden
        if only_hidden:
            ctx.save_for_backward(torch.cat(logp_slopes), torch.cat(entropy_slopes) if entropy_grad else None)
        else:
            ctx.save_for_backward(hidden_KD, weight_VD, bias_V, targets_K, lse_K, entropy_K)
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


def _recomputed_gradients(
    ctx: Any, dlogps_K: Tensor, dentropy_K: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that are needed, with each chunk's logits built once more."""
    hidden_KD, weight_VD, bias_V, targets_K, lse_K, entropy_K = ctx.saved_tensors
    chunk, temperature, softcap, _, entropy_grad = ctx.options
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    head = _Head(weight_VD, bias_V, temperature, softcap)
    # Summed over chunks in fp32: a bf16 sum would lose the small terms.
    dweight_VD = torch.zeros_like(weight_VD, dtype=lse_K.dtype) if needs_weight else None
    dbias_V = torch.zeros_like(bias_V, dtype=lse_K.dtype) if needs_bias else None
    dhidden = []
    for start in range(0, hidden_KD.shape[0], chunk):
        part = slice(start, start + chunk)
        scaled_CV = head.scaled_logits(hidden_KD[part])
        from_entropy_CV = None
        slope = head.slope(scaled_CV)
        if entropy_grad:
            probs_CV = (scaled_CV - lse_K[part, None]).exp_()
            from_entropy_CV = _entropy_gradient(head, scaled_CV, probs_CV, lse_K[part], entropy_K[part])
        else:
            probs_CV = scaled_CV.sub_(lse_K[part, None]).exp_()
        weights_C = dlogps_K[part] * slope if isinstance(slope, float) else dlogps_K[part]
        gradient_CV = _times_target_minus_probs(probs_CV, targets_K[part], weights_C)
        if isinstance(slope, Tensor):
            gradient_CV.mul_(slope)
        if from_entropy_CV is not None:
            gradient_CV.addcmul_(from_entropy_CV, dentropy_K[part, None])
        if dbias_V is not None:
            dbias_V += gradient_CV.sum(0)
        gradient_CV = gradient_CV.to(weight_VD.dtype)
        if needs_hidden:
            dhidden.append(gradient_CV @ weight_VD)
        if dweight_VD is not None:
            if dweight_VD.dtype == hidden_KD.dtype:
                dweight_VD.addmm_(gradient_CV.t(), hidden_KD[part])
            else:
                dweight_VD += _mm_wide(gradient_CV.t(), hidden_KD[part])
    return (
        (torch.cat(dhidden) if dhidden else torch.zeros_like(hidden_KD)) if needs_hidden else None,
        dweight_VD.to(weight_VD.dtype) if dweight_VD is not None else None,
        dbias_V.to(bias_V.dtype) if dbias_V is not None else None,
    )


def _require_shapes(hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_K: Tensor) -> None:
    fits = (
        hidden_KD.dim() == weight_VD.dim() == 2
        and hidden_KD.shape[1] == weight_VD.shape[1]
        and targets_K.shape == hidden_KD.shape[:1]
        and (bias_V is None or bias_V.shape == weight_VD.shape[:1])
    )
    if not fits:
        bias_shape = None if bias_V is None else tuple(bias_V.shape)
        raise ValueError(
            f"hidden {tuple(hidden_KD.shape)}, weight {tuple(weight_VD.shape)}, bias {bias_shape} and targets "
            f"{tuple(targets_K.shape)} do not fit; expected (K, D), (V, D), (V,) or None, and (K,)"
        )


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
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies under softmax((hidden W^T + bias) / temperature), both (K,).

    In nats, in fp32 (fp64 for fp64 inputs). `chunk` tokens are projected at a time; it changes memory, never the
    result. Entropies are 0 without `entropy`, which saves passes over
    the logits, and carry a gradient only with `entropy_grad`. `softcap` s replaces a logit x by s tanh(x / s)
    before the temperature, as Gemma 2 does; a model's logit scale goes into the temperature (temperature / scale).
    Under autocast the projection runs in its dtype, as a linear layer would. The weight must be whole: gather it
    first where it is sharded.
    Raises ValueError where the shapes do not fit, or chunk or temperature is not positive.
    """
    _require_shapes(hidden_KD, weight_VD, bias_V, targets_K)
    if chunk <= 0 or temperature <= 0:
        raise ValueError(f"chunk is {chunk} and temperature {temperature}; both must be positive")
    device_type = hidden_KD.device.type
    dtype = torch.promote_types(hidden_KD.dtype, weight_VD.dtype)
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    # Cast out here, where autograd casts the gradients back.
    hidden_KD, weight_VD = hidden_KD.to(dtype), weight_VD.to(dtype)
    if not torch.is_grad_enabled():
        # Otherwise the forward pass would prepare gradients that nobody asks for.
        hidden_KD, weight_VD = hidden_KD.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    options = (chunk, temperature, softcap, entropy or entropy_grad, entropy_grad)
    with torch.autocast(device_type, enabled=False):
        logps_K, entropy_K = _ChunkedLinearLogprobs.apply(hidden_KD, weight_VD, bias_V, targets_K, options)
    return logps_K, entropy_K
