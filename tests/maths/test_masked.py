"""Masked sums, means, variances and whitening: values by hand, NumPy as oracle, garbage off the mask."""

import numpy as np
import pytest
import torch

from chatalign.maths import Moments, masked_mean, masked_moments, masked_sum, masked_var, masked_whiten, whiten_with

VALUES_BT = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
MASK_BT = torch.tensor([[True, True, False], [True, False, False]])


def test_values_by_hand() -> None:
    assert masked_sum(VALUES_BT, MASK_BT).item() == 6
    assert masked_mean(VALUES_BT, MASK_BT).item() == 2
    assert masked_mean(VALUES_BT, MASK_BT, dim=1).tolist() == [1.5, 3.0]
    assert masked_var(VALUES_BT, MASK_BT).item() == pytest.approx(2 / 3)
    assert masked_var(VALUES_BT, MASK_BT, unbiased=True).item() == pytest.approx(1)
    expected = [[-(1.5**0.5), 0, 0], [1.5**0.5, 0, 0]]
    torch.testing.assert_close(masked_whiten(VALUES_BT, MASK_BT), torch.tensor(expected))


def test_nothing_kept_gives_zero() -> None:
    nothing_BT = torch.zeros_like(MASK_BT)
    assert masked_mean(VALUES_BT, nothing_BT).item() == 0
    assert masked_var(VALUES_BT, nothing_BT, unbiased=True).item() == 0
    assert masked_whiten(VALUES_BT, nothing_BT).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_what_stands_off_the_mask_changes_nothing(garbage: float) -> None:
    clean_BT = VALUES_BT.clone().requires_grad_()
    dirty_BT = torch.where(MASK_BT, VALUES_BT, garbage).requires_grad_()
    for function in (masked_sum, masked_mean, masked_var, lambda v, m: masked_whiten(v, m).square().sum()):
        from_clean, from_dirty = function(clean_BT, MASK_BT), function(dirty_BT, MASK_BT)
        assert torch.equal(from_clean, from_dirty)
        (gradient_BT,) = torch.autograd.grad(from_dirty, dirty_BT)
        assert torch.equal(gradient_BT, torch.autograd.grad(from_clean, clean_BT)[0])
        assert (gradient_BT[~MASK_BT] == 0).all()


def test_whitening_against_numpy_and_its_identities() -> None:
    values_BT, mask_BT = torch.randn(5, 7) * 3 + 50, torch.rand(5, 7) > 0.4
    kept = values_BT.numpy()[mask_BT.numpy()].astype(np.float64)
    whitened_BT = masked_whiten(values_BT, mask_BT)
    np.testing.assert_allclose(whitened_BT[mask_BT], (kept - kept.mean()) / kept.std(), atol=1e-4)
    unshifted_BT = masked_whiten(values_BT, mask_BT, shift_mean=False)
    assert masked_mean(unshifted_BT, mask_BT).item() == pytest.approx(kept.mean(), rel=1e-5)
    assert masked_var(unshifted_BT, mask_BT).item() == pytest.approx(1, rel=1e-3)


def test_moments_of_the_parts_add_up_to_those_of_the_whole() -> None:
    values_BT, mask_BT = torch.randn(6, 4), torch.rand(6, 4) > 0.3
    parts = [masked_moments(values_BT[rows], mask_BT[rows]) for rows in (slice(0, 1), slice(1, 6))]
    reduced = Moments.unpack(parts[0].pack() + parts[1].pack())
    split_BT = torch.cat([whiten_with(values_BT[rows], mask_BT[rows], reduced) for rows in (slice(0, 1), slice(1, 6))])
    torch.testing.assert_close(split_BT, masked_whiten(values_BT, mask_BT))
    assert (parts[0] + parts[1]).mean == reduced.mean


def test_variance_survives_a_mean_far_from_zero() -> None:
    values_K = 1e4 + torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert masked_moments(values_K, torch.ones(4)).var.item() == pytest.approx(1)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"values \(2, 3\), mask \(2, 2\)"):
        masked_sum(VALUES_BT, MASK_BT[:, :2])
    with pytest.raises(ValueError, match="expected"):
        Moments.unpack(torch.zeros(2))
