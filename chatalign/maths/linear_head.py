"""What the chunked loss heads share: the projection, its softmax, and gradients added up over chunks.

Shapes: K kept tokens, D hidden size, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_LOW_PRECISION = (torch.bfloat16, torch.float16)
# On a CPU in half precision: of logits' gradients that wait to be multiplied with their hidden states at once.
_WAITING_BYTES = 8 * 2**20


class Head:
    """The projection as it stands in one call: z = squash(hidden W^T + bias) / temperature.

    On a CPU all chunks share two buffers: to fault in fresh memory takes longer than a pass over it (measured:
    1.5 × the head's time).
    """

    def __init__(
        self, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None, chunk: int
    ) -> None:
        self.weight_VD, self.bias_V, self.temperature, self.softcap = weight_VD, bias_V, temperature, softcap
        self.chunk, self.low = chunk, weight_VD.dtype in _LOW_PRECISION
        self.wide_products = self.low and weight_VD.is_cuda and torch.version.hip is None
        self._buffers: tuple[Tensor, Tensor] | None = None
        if not weight_VD.is_cuda:
            own_CV = weight_VD.new_empty(chunk, weight_VD.shape[0])
            self._buffers = own_CV, (torch.empty_like(own_CV, dtype=torch.float32) if self.low else own_CV)

    def scaled_logits(self, hidden_CD: Tensor) -> Tensor:
        """Logits over temperature in fp32 (fp64 for fp64), (C, V), in a buffer that the caller may overwrite."""
        logits_CV = self._logits(hidden_CD)
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV if self.temperature == 1 else logits_CV.div_(self.temperature)

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        if self.wide_products:
            return torch.mm(hidden_CD, self.weight_VD.t(), out_dtype=torch.float32)
        if self._buffers is None:
            product_CV = hidden_CD @ self.weight_VD.t()
            return product_CV.float() if self.low else product_CV
        own_CV, wide_CV = (buffer[: len(hidden_CD)] for buffer in self._buffers)
        torch.mm(hidden_CD, self.weight_VD.t(), out=own_CV)
        return wide_CV.copy_(own_CV) if self.low else own_CV

    def copied(self, scaled_CV: Tensor) -> Tensor:
        """A copy that the caller may overwrite, in the buffer of the logits where there is one."""
        return scaled_CV.clone() if self._buffers is None else self._buffers[1][: len(scaled_CV)].copy_(scaled_CV)

    def narrowed(self, gradient_CV: Tensor) -> Tensor:
        """A gradient in the dtype of the products."""
        if not self.low or self._buffers is None:
            return gradient_CV.to(self.weight_VD.dtype)
        return self._buffers[0][: len(gradient_CV)].copy_(gradient_CV)

    def slope(self, scaled_CV: Tensor) -> Tensor | float:
        """d (scaled logit) / d (raw logit): 1 / temperature, less where the softcap bends."""
        if self.softcap is None:
            return 1 / self.temperature
        squashed_CV = scaled_CV * (self.temperature / self.softcap)
        return squashed_CV.square_().neg_().add_(1).div_(self.temperature)


class Gradients:
    """d loss / d hidden, weight and bias, those that are needed, added up over chunks; the last two in fp32."""

    def __init__(self, head: Head, hidden_KD: Tensor, needed: tuple[bool, bool, bool]) -> None:
        self.head, self.hidden_KD = head, hidden_KD
        weight_VD, bias_V = head.weight_VD, head.bias_V
        # Summed over chunks in fp32: a bf16 sum would lose the small terms.
        dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        self.dhidden_KD = torch.empty_like(hidden_KD) if needed[0] else None
        self.dweight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needed[1] else None
        self.dbias_V = torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needed[2] else None
        # The weight's gradient is as large as the weight: to add to it for each chunk took as long as the products.
        self._waiting_WV: Tensor | None = None
        self._waiting = slice(0, 0)
        if needed[1] and head.low and not weight_VD.is_cuda:
            rows = min(len(hidden_KD), max(head.chunk, _WAITING_BYTES // (2 * len(weight_VD))))
            self._waiting_WV = weight_VD.new_empty(rows, len(weight_VD))

    def add(self, gradient_CV: Tensor, part: slice) -> None:
        """Take in d loss / d raw logits of the tokens in `part`, which follow those taken in before."""
        if self.dbias_V is not None:
            self.dbias_V += gradient_CV.sum(0)
        gradient_CV = self._narrowed(gradient_CV, part)
        if self.dhidden_KD is not None:
            self.dhidden_KD[part] = gradient_CV @ self.head.weight_VD
        if self.dweight_VD is not None and self._waiting_WV is None:
            self._add_product(gradient_CV, self.hidden_KD[part])

    def _narrowed(self, gradient_CV: Tensor, part: slice) -> Tensor:
        if self._waiting_WV is None:
            return self.head.narrowed(gradient_CV)
        if part.start + len(gradient_CV) - self._waiting.start > len(self._waiting_WV):
            self._flush()
        self._waiting = slice(self._waiting.start, part.start + len(gradient_CV))
        place = slice(part.start - self._waiting.start, self._waiting.stop - self._waiting.start)
        return self._waiting_WV[place].copy_(gradient_CV)

    def _flush(self) -> None:
        """Multiply the gradients that wait with their hidden states."""
        if self._waiting_WV is not None and self._waiting.stop > self._waiting.start:
            gradient_WV = self._waiting_WV[: self._waiting.stop - self._waiting.start]
            self._add_product(gradient_WV, self.hidden_KD[self._waiting])
            self._waiting = slice(self._waiting.stop, self._waiting.stop)

    def _add_product(self, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        assert self.dweight_VD is not None
        if self.dweight_VD.dtype == hidden_CD.dtype:
            self.dweight_VD.addmm_(gradient_CV.t(), hidden_CD)
        elif self.head.wide_products:
            self.dweight_VD += torch.mm(gradient_CV.t(), hidden_CD, out_dtype=torch.float32)
        else:
            self.dweight_VD += gradient_CV.t() @ hidden_CD

    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias, before they are rounded to those tensors' dtypes."""
        self._flush()
        return self.dhidden_KD, self.dweight_VD, self.dbias_V


def in_dtypes(gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Each gradient in its dtype; None stays."""
    return [None if x is None else x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True)]


def softmax_chunk(
    scaled_CV: Tensor, targets_C: Tensor, *, entropy: bool, overwrite: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities (C, V), and log-probabilities of the targets, entropies (or 0) and log-normalisers, each (C,).

    The probabilities take the logits' place with `overwrite`.
    """
    largest_C = scaled_CV.amax(-1)
    targeted_C = scaled_CV.gather(-1, targets_C[:, None]).squeeze(-1)
    # By hand: one exp serves the normaliser, the entropy and the gradient.
    shifted_CV = scaled_CV.sub_(largest_C[:, None]) if overwrite else scaled_CV - largest_C[:, None]
    probs_CV = shifted_CV.exp_()
    total_C = probs_CV.sum(-1)
    probs_CV.div_(total_C[:, None])
    lse_C = largest_C + total_C.log()
    entropy_C = lse_C - torch.linalg.vecdot(probs_CV, scaled_CV) if entropy else torch.zeros_like(lse_C)
    return probs_CV, targeted_C - lse_C, entropy_C, lse_C


def log_probs_chunk(scaled_CV: Tensor, targets_C: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (C, V), those of the targets and entropies (or 0), each (C,); the logits are overwritten."""
    log_probs_CV = torch.log_softmax(scaled_CV, -1)
    logps_C = log_probs_CV.gather(-1, targets_C[:, None]).squeeze(-1)
    if not entropy:
        return log_probs_CV, logps_C, torch.zeros_like(logps_C)
    probs_CV = torch.exp(log_probs_CV, out=scaled_CV)
    return log_probs_CV, logps_C, -torch.linalg.vecdot(probs_CV, log_probs_CV)


def logprobs_chunk(scaled_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and log-normalisers, each (C,), in one fused pass: without the entropy."""
    # Out of range a target raises; the default would pass over −100.
    logps_C = -cross_entropy(scaled_CV, targets_C, reduction="none", ignore_index=torch.iinfo(torch.int64).min)
    return logps_C, scaled_CV.gather(-1, targets_C[:, None]).squeeze(-1) - logps_C


def times_logp_gradient(weights_C: Tensor, slope: Tensor | float, probs_CV: Tensor, targets_C: Tensor) -> Tensor:
    """w · d logp / d raw logits = w · (1[target] − p) · slope, (C, V), in the buffer of the probabilities."""
    if isinstance(slope, float):
        weights_C = weights_C * slope
    gradient_CV = probs_CV.mul_(-weights_C[:, None])
    # The target's 1 joins in fp32, before any rounding to bf16: where p is near 1 the difference is what is left.
    gradient_CV.scatter_add_(-1, targets_C[:, None], weights_C[:, None])
    return gradient_CV if isinstance(slope, float) else gradient_CV.mul_(slope)


def resolve(
    hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_K: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias as the loss heads want them: of one dtype, autocast's where that is on."""
    _require_shapes(hidden_KD, weight_VD, bias_V, targets_K)
    if chunk <= 0:
        raise ValueError(f"chunk is {chunk}; it must be positive")
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
    return hidden_KD, weight_VD, bias_V


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
