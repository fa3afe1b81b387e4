"""Sums, means, variances and whitening over the entries that a mask keeps.

A masked-out entry is absent: whatever stands there, NaN and infinity included, changes neither a result nor a
gradient. Masks are bool or 0/1 tensors of the same shape as the values.

Shapes: B batch, T response tokens; the functions take any one shape, a flat (K,) included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, naming each tensor with its shape, unless all the shapes are equal."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; pass tensors of one shape")


def at_least_fp32(values: Tensor) -> Tensor:
    """The same values in float32, or in float64 where they already are: what sums are accumulated in."""
    return values if values.dtype == torch.float64 else values.float()


def masked_sum(values_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the kept entries in fp32, over everything or along `dim`; 0 where none is kept.

    Raises ValueError where the shapes differ.
    """
    require_same_shape(values=values_BT, mask=mask_BT)
    # where, not a product: 0 · NaN would let padding through.
    kept_BT = torch.where(mask_BT.bool(), at_least_fp32(values_BT), 0.0)
    return kept_BT.sum() if dim is None else kept_BT.sum(dim)


def masked_mean(values_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the kept entries in fp32, over everything or along `dim`; 0 where none is kept.

    Raises ValueError where the shapes differ.
    """
    mask_BT = mask_BT.bool()
    count = mask_BT.sum() if dim is None else mask_BT.sum(dim)
    return masked_sum(values_BT, mask_BT, dim) / count.clamp(min=1)


def masked_var(values_BT: Tensor, mask_BT: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance of the kept entries, a scalar; 0 where fewer than two are kept.

    `unbiased` divides by n - 1 in place of n. Raises ValueError where the shapes differ.
    """
    require_same_shape(values=values_BT, mask=mask_BT)
    mask_BT = mask_BT.bool()
    count = mask_BT.sum()
    # Emptied before the square, whose derivative would make NaN of an infinity off the mask.
    values_BT = torch.where(mask_BT, at_least_fp32(values_BT), 0.0)
    deviation_BT = values_BT - masked_mean(values_BT, mask_BT)
    divisor = (count - 1 if unbiased else count).clamp(min=1)
    return masked_sum(deviation_BT.square(), mask_BT) / divisor


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of the kept entries: what processes add up to share a mean and a variance.

    A distributed caller reduces `pack()` with SUM and reads the result through `unpack`.
    """

    count: Tensor
    total: Tensor
    total_of_squares: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean, a scalar; 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)

    @property
    def var(self) -> Tensor:
        """Variance (divided by n), a scalar, never negative."""
        return (self.total_of_squares / self.count.clamp(min=1) - self.mean.square()).clamp(min=0)

    def pack(self) -> Tensor:
        """The three numbers as one tensor of shape (3,), ready for one all-reduce."""
        return torch.stack([self.count, self.total, self.total_of_squares])

    @staticmethod
    def unpack(packed_3: Tensor) -> Moments:
        """Moments from a tensor that `pack` made, or the sum of several. Raises ValueError on another shape."""
        if packed_3.shape != (3,):
            raise ValueError(f"packed moments have shape {tuple(packed_3.shape)}; expected (3,)")
        count, total, total_of_squares = packed_3.unbind()
        return Moments(count, total, total_of_squares)

    def __add__(self, other: Moments) -> Moments:
        return Moments.unpack(self.pack() + other.pack())


def masked_moments(values_BT: Tensor, mask_BT: Tensor) -> Moments:
    """Moments of the kept entries, detached, in float64 (float32 on mps, which has no float64).

    Raises ValueError where the shapes differ.
    """
    # float64: a difference of sums loses the variance in fp32 once the mean is 1,000 deviations away.
    dtype = torch.float32 if values_BT.device.type == "mps" else torch.float64
    wide_BT = values_BT.detach().to(dtype)
    return Moments(
        count=mask_BT.bool().sum().to(dtype),
        total=masked_sum(wide_BT, mask_BT),
        total_of_squares=masked_sum(wide_BT.square(), mask_BT),
    )


def whiten_with(
    values_BT: Tensor, mask_BT: Tensor, moments: Moments, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Values scaled to unit variance under the given moments, shape (B, T), 0 at masked entries.

    The mean becomes 0 with `shift_mean`, else it stays what it was (as for rewards).
    Raises ValueError where the shapes differ. Source: Huang et al. (2403.17031) (reward and advantage whitening).
    """
    require_same_shape(values=values_BT, mask=mask_BT)
    values_BT = at_least_fp32(values_BT)
    mean = moments.mean.to(values_BT.dtype)
    whitened_BT = (values_BT - mean) * torch.rsqrt(moments.var + eps).to(values_BT.dtype)
    if not shift_mean:
        whitened_BT = whitened_BT + mean
    return torch.where(mask_BT.bool(), whitened_BT, 0.0)


def masked_whiten(
    values_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True, moments: Moments | None = None
) -> Tensor:
    """Values whitened over the kept entries, shape (B, T), 0 at masked entries.

    Pass `moments` reduced over all processes to whiten over the global batch; without, this tensor's own serve.
    Raises ValueError where the shapes differ. Source: Huang et al. (2403.17031).
    """
    own = masked_moments(values_BT, mask_BT) if moments is None else moments
    return whiten_with(values_BT, mask_BT, own, shift_mean=shift_mean)
