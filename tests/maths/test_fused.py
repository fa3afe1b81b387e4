"""The fused norm, rotary embedding, gated unit and LoRA product give the plain formulas' values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from chatalign.maths import fused

D, R, OUT = 8, 3, 5
DTYPES = (torch.float32, torch.float64)
LEADING = ((7,), (2, 3), (1, 2, 4))


def plain_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-3) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight_D


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * gate.sigmoid() * up


def plain_swiglu_linear(gate: Tensor, up: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    return plain_swiglu(gate, up) @ weight_OI.t() + bias_O


def plain_lora(x: Tensor, weight_OI: Tensor, bias_O: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    return x @ weight_OI.t() + bias_O + scaling * (x @ a_RI.t() @ b_OR.t())


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values, dtype and the gradients of all inputs; the inputs stay as they were."""
    before = [x.detach().clone() for x in inputs]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    our_y, their_y = ours(*leaves), theirs(*leaves)
    exact = our_y.dtype == torch.float64
    close = {"atol": 1e-12, "rtol": 1e-12} if exact else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(our_y, their_y, **close)
    upstream = torch.randn_like(their_y)
    pairs = zip(
        torch.autograd.grad(our_y, leaves, upstream), torch.autograd.grad(their_y, leaves, upstream), strict=True
    )
    for our_grad, their_grad in pairs:
        torch.testing.assert_close(our_grad, their_grad, **close)
    assert all(map(torch.equal, before, leaves))


def angles(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.randn(*shape, D // 2, dtype=dtype)
    both = torch.cat((half, half), dim=-1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", LEADING)
def test_norm_and_gated_unit_are_their_formulas(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight_D, up = torch.randn(*leading, D, dtype=dtype), torch.randn(D, dtype=dtype), torch.randn(*leading, D)
    assert_same(lambda *y: fused.rms_norm(*y, 1e-3), plain_norm, [x, weight_D])
    assert_same(fused.swiglu, plain_swiglu, [3 * x, up.to(dtype)])
    last = [torch.randn(OUT, D, dtype=dtype), torch.randn(OUT, dtype=dtype)]
    assert_same(fused.swiglu_linear, plain_swiglu_linear, [3 * x, up.to(dtype), *last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_its_formula_and_keeps_lengths(dtype: torch.dtype) -> None:
    cos, sin = angles(1, 1, 5, dtype=dtype)
    x = torch.randn(2, 3, 5, D, dtype=dtype)
    assert_same(lambda y: fused.rotary(y, cos, sin), lambda y: plain_rotary(y, cos, sin), [x])
    strided = torch.randn(2, 5, 3, D, dtype=dtype).transpose(1, 2)  # as attention has it
    assert_same(lambda y: fused.rotary(y, cos, sin), lambda y: plain_rotary(y, cos, sin), [strided])
    torch.testing.assert_close(fused.rotary(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_a_quarter_turn_by_hand() -> None:
    x, cos, sin = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1, 4), torch.ones(1, 4)
    assert fused.rotary(x, cos, sin).tolist() == [[-3.0, -4.0, 1.0, 2.0]]


def test_a_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # mean square 12.5, and one that eps alone keeps from 0 / 0
    expected = torch.tensor([[3.0, 8.0], [0.0, 0.0]]) / 12.5**0.5
    torch.testing.assert_close(fused.rms_norm(x, torch.tensor([1.0, 2.0]), 1e-9), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", LEADING)
def test_lora_is_its_formula(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    weight_OI, bias_O = torch.randn(OUT, D, dtype=dtype), torch.randn(OUT, dtype=dtype)
    trained = [torch.randn(*shape, dtype=dtype) for shape in ((*leading, D), (R, D), (OUT, R))]
    assert_same(
        lambda x, a, b: fused.lora_linear(x, weight_OI, bias_O, a, b, 0.7),
        lambda x, a, b: plain_lora(x, weight_OI, bias_O, a, b, 0.7),
        trained,
    )
    assert_same(
        lambda x, a, b: fused.lora_linear(x, weight_OI, None, a, b, -2.0),
        lambda x, a, b: plain_lora(x, weight_OI, torch.zeros_like(bias_O), a, b, -2.0),
        trained,
    )


def test_gradcheck_in_double() -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    cos, sin = angles(3, dtype=torch.float64)
    weight_OI = torch.randn(OUT, D, dtype=torch.float64)
    bias_O = torch.randn(OUT, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: fused.rms_norm(x, w, 1e-2), (draw(2, 3, D), draw(D)))
    assert torch.autograd.gradcheck(lambda x: fused.rotary(x, cos, sin), (draw(2, 3, D),))
    assert torch.autograd.gradcheck(fused.swiglu, (draw(2, 3, D), draw(2, 3, D)))
    assert torch.autograd.gradcheck(fused.swiglu_linear, (draw(2, 3, D), draw(2, 3, D), draw(OUT, D), draw(OUT)))
    assert torch.autograd.gradcheck(
        lambda x, a, b: fused.lora_linear(x, weight_OI, bias_O, a, b, 1.7), (draw(2, 3, D), draw(R, D), draw(OUT, R))
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_a_product_that_is_made_again_is_the_same_to_the_bit_and_is_not_kept(autocast: bool) -> None:
    inputs = [torch.randn(40, 64), torch.randn(40, 64), torch.randn(48, 64)]
    results, kept = [], []
    for function in (fused.swiglu_linear, lambda gate, up, w, b: F.linear(fused.swiglu(gate, up), w, b)):
        saved: dict[int, Tensor] = {}
        leaves = [x.clone().requires_grad_() for x in inputs]
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
            saved_tensors_hooks(lambda x, saved=saved: saved.setdefault(x.data_ptr(), x), lambda x: x),
        ):
            half = torch.bfloat16 if autocast else torch.float32  # what the linear layers before it give
            out = function(leaves[0].to(half), leaves[1].to(half), leaves[2], None)
        out.float().pow(2).sum().backward()
        results.append([out, *(x.grad for x in leaves)])
        kept.append(sum(x.nbytes for x in saved.values() if x.shape == (40, 64)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert kept[0] * 3 == kept[1] * 2


def test_a_frozen_weight_or_input_takes_no_gradient() -> None:
    x, weight_D = torch.randn(4, D), torch.randn(D)
    for inputs in ((x.clone().requires_grad_(), weight_D), (x, weight_D.clone().requires_grad_())):
        ours, theirs = fused.rms_norm(*inputs, 1e-3), plain_norm(*inputs)
        trained = [y for y in inputs if y.requires_grad]
        our_grad, their_grad = (torch.autograd.grad(y.pow(2).sum(), trained)[0] for y in (ours, theirs))
        torch.testing.assert_close(our_grad, their_grad, atol=1e-5, rtol=1e-5)


def test_a_norm_rounds_to_the_dtype_asked_for_at_the_end_only() -> None:
    x, weight_D = torch.randn(6, D, requires_grad=True), torch.randn(D, requires_grad=True)
    rounded = fused.rms_norm(x, weight_D, 1e-3, torch.bfloat16)
    whole = fused.rms_norm(x, weight_D, 1e-3)
    assert rounded.dtype == torch.bfloat16
    assert whole.dtype == torch.float32
    assert torch.equal(rounded, whole.bfloat16())
    upstream = torch.randn(6, D).bfloat16()
    ours = torch.autograd.grad(rounded, (x, weight_D), upstream)
    theirs = torch.autograd.grad(whole, (x, weight_D), upstream.float())
    assert [y.dtype for y in ours] == [torch.float32] * 2
    assert all(map(torch.equal, ours, theirs))


def test_lora_refuses_a_base_that_trains() -> None:
    x, a_RI, b_OR = torch.randn(2, D), torch.randn(R, D), torch.randn(OUT, R)
    weight_OI, bias_O = torch.randn(OUT, D), torch.randn(OUT)
    with pytest.raises(ValueError, match="must be frozen"):
        fused.lora_linear(x, weight_OI.clone().requires_grad_(), bias_O, a_RI, b_OR, 1.0)
    with pytest.raises(ValueError, match="must be frozen"):
        fused.lora_linear(x, weight_OI, bias_O.clone().requires_grad_(), a_RI, b_OR, 1.0)


def test_lora_on_no_tokens() -> None:
    a_RI, b_OR = torch.randn(R, D, requires_grad=True), torch.randn(OUT, R, requires_grad=True)
    out = fused.lora_linear(torch.randn(1, 0, D), torch.randn(OUT, D), None, a_RI, b_OR, 1.0)
    assert out.shape == (1, 0, OUT)
    out.sum().backward()
    assert not a_RI.grad.any()
    assert not b_OR.grad.any()


def peft_layer(bias: bool) -> Any:
    layer = LoraLinear(
        nn.Linear(64, 48, bias=bias), "default", r=4, lora_alpha=10, config=LoraConfig(r=4, lora_alpha=10)
    )
    layer.base_layer.requires_grad_(False)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("x_grad", [False, True])
@pytest.mark.parametrize("rows", [9, 60])  # fewer tokens than outputs, and more: B A joins dx, or W
def test_lora_is_pefts_layer(rows: int, bias: bool, x_grad: bool, autocast: bool) -> None:
    layer = peft_layer(bias)
    twin = copy.deepcopy(layer)
    inputs = [torch.randn(2, rows, 64).requires_grad_(x_grad)]
    inputs.append(inputs[0].detach().clone().requires_grad_(x_grad))
    base = layer.base_layer
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs = twin(inputs[1])
        ours = fused.lora_linear(
            inputs[0],
            base.weight,
            base.bias,
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.scaling["default"],
        )
    assert ours.dtype == theirs.dtype == (torch.bfloat16 if autocast else torch.float32)
    for out in (ours, theirs):
        (out.float() * torch.linspace(-1, 1, 48)).sum().backward()
    pairs = [(ours, theirs)] + ([(inputs[0].grad, inputs[1].grad)] if x_grad else [])
    for ours_, theirs_ in zip(layer.parameters(), twin.parameters(), strict=True):
        assert (ours_.grad is None) == (theirs_.grad is None)
        if ours_.grad is not None:
            assert ours_.grad.dtype == torch.float32
            pairs.append((ours_.grad, theirs_.grad))
    assert len(pairs) == 3 + x_grad
    for ours_, theirs_ in pairs:
        gap = float((ours_.float() - theirs_.float()).norm() / theirs_.float().norm())
        assert gap < (0.01 if autocast else 1e-6)  # bf16 has 8 bits: a rounding is 1 / 256 at most


def test_an_adapter_smaller_than_a_rounding_of_its_weights_counts_in_bf16() -> None:
    # As after the first steps on a bf16 checkpoint: B A is a thousandth of W, bf16's steps a 256th. W + B A in bf16
    # gives 0.6 of what the adapter does.
    weight_OI = torch.randn(48, 64).bfloat16().float()
    x, a_RI, b_OR = torch.randn(1, 4096, 64), torch.randn(4, 64), 5e-4 * torch.randn(48, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = fused.lora_linear(x, weight_OI, None, a_RI, b_OR, 1.0) - F.linear(x, weight_OI)
    wanted = x @ (b_OR @ a_RI).t()
    assert float((moved.float() * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.05)


def test_rotary_of_bf16_queries_by_fp32_angles_is_fp32() -> None:
    # Under autocast a projection gives bf16 and the cosines are fp32.
    x = torch.randn(1, 2, 4, D).bfloat16().requires_grad_()
    cos, sin = angles(1, 1, 4, dtype=torch.float32)
    ours, theirs = fused.rotary(x, cos, sin), plain_rotary(x, cos, sin)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    upstream = torch.randn_like(ours)
    our_grad, their_grad = (torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs))
    assert our_grad.dtype == torch.bfloat16
    torch.testing.assert_close(our_grad, their_grad, atol=0.03, rtol=0.03)


def test_nothing_is_kept_without_gradients() -> None:
    x = torch.randn(3, D, requires_grad=True)
    with torch.no_grad():
        assert fused.rms_norm(x, torch.ones(D), 1e-3).grad_fn is None
        assert fused.swiglu(x, F.relu(x)).grad_fn is None
