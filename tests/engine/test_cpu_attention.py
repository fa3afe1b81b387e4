"""Attention on a CPU with its own gradient: as SDPA under autograd gives it, with less kept for the backward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from whole_row_attention import dense_mask, sdpa

from chatalign.engine import attention, cpu_attention
from chatalign.engine.attention import SegmentPlan, segment_attention_forward
from engine.test_flex_attention import plan_of

HEADS, SIZE = 4, 32
PLANS = {
    "one": plan_of((9, None)),
    "long": plan_of((200, None), (1, None), (150, None), (200, None)),
    "short": plan_of(*((length, None) for length in (5, 7, 1, 7, 1, 5, 7))),
    "unequal": plan_of((30, None), (150, None), (2, None), (170, None)),
}


@pytest.fixture(autouse=True)
def _at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_MEAN_LENGTH", 1)


def inputs(plan: SegmentPlan, qk: torch.dtype, v: torch.dtype, *, heads_first: bool = False) -> list[Tensor]:
    """q, k, v and the output's gradient; q, k and v lie in memory as linear layers leave them, or head by head."""
    torch.manual_seed(0)
    total = sum(plan.lengths)
    rows = [torch.randn(1, total, HEADS, SIZE).to(dtype).transpose(1, 2) for dtype in (qk, qk, v)]
    rows = [(row.contiguous() if heads_first else row).requires_grad_() for row in rows]
    return [*rows, torch.randn(1, total, HEADS, SIZE).to(v)]


def results(plan: SegmentPlan, rows: list[Tensor], scaling: float | None = None) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *qkv, grad = rows
    output = attention._segment_by_segment(*qkv, plan, 0.0, scaling, None)
    return [output.detach(), *torch.autograd.grad(output, qkv, grad)]


def under_autograd(plan: SegmentPlan, rows: list[Tensor], scaling: float | None = None) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "fits", lambda *_: False)
        return results(plan, rows, scaling)


@pytest.mark.parametrize("heads_first", [False, True], ids=["tokens first", "heads first"])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("name", PLANS)
def test_float32_is_as_under_autograd(name: str, scaling: float | None, heads_first: bool) -> None:
    plan = PLANS[name]
    rows = inputs(plan, torch.float32, torch.float32, heads_first=heads_first)
    for ours, theirs in zip(results(plan, rows, scaling), under_autograd(plan, rows, scaling), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("qk", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_bf16_is_as_under_autograd(name: str, qk: torch.dtype) -> None:
    """Rounding moves the output by up to 2⁻⁸ of itself, and through the row sums of dO · O the gradients of q and k."""
    plan = PLANS[name]
    rows = inputs(plan, qk, torch.bfloat16)
    ours, theirs = results(plan, rows), under_autograd(plan, rows)
    assert [x.dtype for x in ours] == [torch.bfloat16, qk, qk, torch.bfloat16]
    for i in (0, 3):
        torch.testing.assert_close(ours[i], theirs[i])
    for i in (1, 2):
        assert (ours[i] - theirs[i]).float().norm() <= 2**-8 * theirs[i].float().norm()


@pytest.mark.parametrize("name", PLANS)
def test_it_is_masked_attention_over_the_row(name: str) -> None:
    plan = PLANS[name]
    *qkv, grad = rows = inputs(plan, torch.float32, torch.float32)
    output = sdpa(*qkv, dense_mask(plan), 0.3)
    theirs = [output.detach(), *torch.autograd.grad(output, qkv, grad)]
    for ours, expected in zip(results(plan, rows, 0.3), theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("short", [0, 2**30], ids=["each alone", "stacked"])
def test_gradients_are_those_of_differences(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_SHORT", short)
    plan = plan_of((2, None), (3, None), (1, None), (3, None), (2, None))
    qkv = [torch.randn(1, 2, 11, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *rows: cpu_attention.attend(*rows, plan, scaling=0.7), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_inputs_and_output_alone_are_kept(name: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    rows = inputs(plan, torch.float32, dtype)
    row = HEADS * SIZE * sum(plan.lengths)
    expected = row * 4 * 2 + row * dtype.itemsize * 2 + row // SIZE * 4
    kept = bytes_kept(plan, rows)
    assert kept == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "fits", lambda *_: False)
        own = bytes_kept(plan, rows)
    assert kept <= own if dtype == torch.float32 else kept < own


def bytes_kept(plan: SegmentPlan, rows: list[Tensor]) -> int:
    """Of the memory that is held for the backward pass, and of the output, which the next layer keeps."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = attention._segment_by_segment(*rows[:3], plan, 0.0, None, None)
    keep(output)
    return sum(storages.values())


def test_grouped_heads_and_autocast() -> None:
    plan = PLANS["unequal"]
    query, key, value, grad = inputs(plan, torch.float32, torch.bfloat16)
    fewer = [x[:, ::2].detach().requires_grad_() for x in (key, value)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = segment_attention_forward(SimpleNamespace(), query, *fewer, None, segments=plan)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(output, (query, *fewer), grad)
    repeated = [x.repeat_interleave(2, dim=1).detach().requires_grad_() for x in fewer]
    expected = results(plan, [query, *repeated, grad])
    assert torch.equal(output, expected[0])
    assert torch.equal(gradients[0], expected[1])
    for ours, theirs in zip(gradients[1:], expected[2:], strict=True):
        torch.testing.assert_close(
            ours, theirs.float().unflatten(1, (2, 2)).sum(2).to(ours.dtype), atol=1e-2, rtol=1e-2
        )


def test_evaluation_and_checkpointing() -> None:
    plan = PLANS["unequal"]
    *qkv, grad = rows = inputs(plan, torch.float32, torch.bfloat16)
    expected, *gradients = results(plan, rows)
    with torch.no_grad():
        output = attention._segment_by_segment(*qkv, plan, 0.0, None, None)
    assert torch.equal(output, expected)
    assert not output.requires_grad
    again = checkpoint(attention._segment_by_segment, *qkv, plan, 0.0, None, None, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(again, qkv, grad), gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_what_the_kernel_lacks_is_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = PLANS["short"], list[Any]()
    attend = cpu_attention.attend
    monkeypatch.setattr(cpu_attention, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    query, key, value, _ = inputs(plan, torch.float32, torch.float32)
    whole = attention._segment_by_segment(query, key, value, plan, 0.0, None, None)
    assert len(calls) == 1
    capped = attention._segment_by_segment(query, key, value, plan, 0.0, None, 1e4)
    narrow = attention._segment_by_segment(query, key, value[..., :8], plan, 0.0, None, None)
    with sdpa_kernel(SDPBackend.MATH):
        by_hand = attention._segment_by_segment(query, key, value, plan, 0.0, None, None)
    strided = attention._segment_by_segment(query, key, value.mT.contiguous().mT, plan, 0.0, None, None)
    dropped = attention._segment_by_segment(query, key, value, plan, 0.5, None, None)
    assert not torch.allclose(dropped, whole)
    monkeypatch.setattr(cpu_attention, "_BACKWARD", None)
    without = attention._segment_by_segment(query, key, value, plan, 0.0, None, None)
    for output in (capped, by_hand, strided, without):
        torch.testing.assert_close(output, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(narrow, whole[..., :8], atol=1e-5, rtol=1e-5)
    assert len(calls) == 1


def test_prefixes_and_short_segments_are_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pair, short, long = (plan_of(*segments) for segments in ([(80, None), (90, 0)], [(63, None)] * 2, [(64, None)] * 2))
    chosen = []
    for plan in (pair, short, long):
        *qkv, _ = inputs(plan, torch.float32, torch.float32)
        chosen.append(cpu_attention.fits(*qkv, plan, 0.0))
    assert chosen == [False, False, True]
