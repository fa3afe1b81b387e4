"""Log-probabilities, entropies and the chunked loss head: equal to the plain path, gradients included."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from chatalign.maths import (
    chunked_linear_logprob_sum,
    chunked_linear_logprobs,
    entropy,
    linear_head,
    mean_by_sequence,
    selected_logprobs,
    sum_by_sequence,
)

K, D, V = 23, 8, 37


@pytest.fixture
def head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_KD = torch.randn(K, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator)
    bias_V = torch.randn(V, generator=generator)
    return hidden_KD, weight_VD, bias_V, torch.randint(V, (K,), generator=generator)


def plain(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_K: Tensor,
    temperature: float,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    logits_KV = torch.nn.functional.linear(hidden_KD, weight_VD, bias_V)
    if cap is not None:
        logits_KV = cap * torch.tanh(logits_KV / cap)
    return selected_logprobs(logits_KV, targets_K, temperature), entropy(logits_KV, temperature)


def test_uniform_logits_give_minus_log_v_and_log_v() -> None:
    logits_KV = torch.full((2, 4), 7.0)
    assert selected_logprobs(logits_KV, torch.tensor([0, 3])).tolist() == pytest.approx([-math.log(4)] * 2)
    assert entropy(logits_KV).tolist() == pytest.approx([math.log(4)] * 2)


def test_plain_path_against_numpy_with_temperature() -> None:
    logits_KV, targets_K = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    scaled = logits_KV.numpy().astype(np.float64) / 0.7
    logps = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    np.testing.assert_allclose(selected_logprobs(logits_KV, targets_K, 0.7), logps[np.arange(6), targets_K], atol=1e-6)
    np.testing.assert_allclose(entropy(logits_KV, 0.7), -(np.exp(logps) * logps).sum(1), atol=1e-6)


def test_impossible_tokens_add_nothing_to_the_entropy_or_its_gradient() -> None:
    logits_KV = torch.tensor([[1.0, 1.0, -math.inf]], requires_grad=True)
    value_K = entropy(logits_KV)
    value_K.sum().backward()
    assert value_K.item() == pytest.approx(math.log(2))
    assert logits_KV.grad is not None
    assert logits_KV.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 5, K, 1000])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "all", "weight", "bias"])
@pytest.mark.parametrize("kept_tokens", [0, 11, 10_000])
def test_chunked_equals_plain_with_gradients(
    head: tuple[Tensor, ...], chunk: int, cap: float | None, entropy_grad: bool, trained: str, kept_tokens: int
) -> None:
    *inputs, targets_K = head
    names = ("hidden", "weight", "bias")
    for name, tensor in zip(names, inputs, strict=True):
        tensor.requires_grad_(trained in (name, "all"))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    options = {"entropy_grad": entropy_grad, "softcap": cap, "kept_tokens": kept_tokens}
    ours = chunked_linear_logprobs(*inputs, targets_K, chunk, 0.7, **options)
    theirs = plain(*inputs, targets_K, 0.7, cap)
    for our_K, their_K in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_K, their_K, atol=1e-5, rtol=1e-6)
    assert ours[1].requires_grad == entropy_grad
    upstream_K = torch.linspace(-1, 1, K)
    our_loss, their_loss = (ours[0] * upstream_K).sum(), (theirs[0] * upstream_K).sum()
    if entropy_grad:
        our_loss, their_loss = our_loss + (ours[1] * upstream_K).sum(), their_loss + (theirs[1] * upstream_K).sum()
    for our_grad, their_grad in zip(
        torch.autograd.grad(our_loss, wanted), torch.autograd.grad(their_loss, wanted), strict=True
    ):
        torch.testing.assert_close(our_grad, their_grad, atol=1e-5, rtol=1e-5)


def test_chunked_equals_plain_to_1e_6_in_double_and_passes_gradcheck(head: tuple[Tensor, ...]) -> None:
    hidden_KD, weight_VD, bias_V = (tensor.double().requires_grad_() for tensor in head[:3])
    ours = chunked_linear_logprobs(hidden_KD, weight_VD, None, head[3], 7)
    for our_K, their_K in zip(ours, plain(hidden_KD, weight_VD, None, head[3], 1.0, None), strict=True):
        torch.testing.assert_close(our_K, their_K, atol=1e-12, rtol=0)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return chunked_linear_logprobs(hidden[:5], weight, bias, head[3][:5], 2, 1.3, entropy_grad=True)

    assert torch.autograd.gradcheck(both, (hidden_KD, weight_VD, bias_V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_log_probabilities_are_not_made_again_and_serve_twice(
    head: tuple[Tensor, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_KD, weight_VD = (tensor.to(dtype).requires_grad_() for tensor in head[:2])
    made = []
    scaled_logits = linear_head.Head.scaled_logits
    monkeypatch.setattr(linear_head.Head, "scaled_logits", lambda *a: made.append(len(a[1])) or scaled_logits(*a))
    chunk, found = 5, []
    for kept_tokens, chunks_again in ((0, -(-K // chunk)), (2 * chunk + 1, -(-K // chunk) - 2), (K + chunk, 0)):
        logps_K, _ = chunked_linear_logprobs(
            hidden_KD, weight_VD, None, head[3], chunk, entropy=False, kept_tokens=kept_tokens
        )
        made.clear()
        for _ in range(2):
            found.append(torch.autograd.grad(logps_K.sum(), (hidden_KD, weight_VD), retain_graph=True))
        assert len(made) == 2 * chunks_again
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0], atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 1e-2)


def test_certain_tokens_keep_their_gradient_in_bf16() -> None:
    # p = 1 - 1e-4 rounds to 1 in bf16; the gradient, 1 - p, must not round to 0 with it.
    hidden_KD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.tensor([[9.25], [0.0]], dtype=torch.bfloat16)
    chunked_linear_logprobs(hidden_KD, weight_VD, None, torch.tensor([0]))[0].sum().backward()
    assert hidden_KD.grad is not None
    assert hidden_KD.grad.item() == pytest.approx(9.25 / (1 + math.exp(9.25)), rel=0.01)


def test_bf16_inputs_are_summed_in_fp32(head: tuple[Tensor, ...]) -> None:
    hidden_KD, weight_VD = (tensor.bfloat16().requires_grad_() for tensor in head[:2])
    logps_K, entropy_K = chunked_linear_logprobs(hidden_KD, weight_VD, None, head[3], 5)
    assert logps_K.dtype == entropy_K.dtype == torch.float32
    logits_KV = (hidden_KD @ weight_VD.t()).float()
    torch.testing.assert_close(logps_K, selected_logprobs(logits_KV, head[3]), atol=1e-5, rtol=0)
    logps_K.sum().backward()
    wide_VD = weight_VD.detach().float().requires_grad_()
    plain(hidden_KD.detach().float(), wide_VD, None, head[3], 1.0, None)[0].sum().backward()
    assert weight_VD.grad is not None
    torch.testing.assert_close(weight_VD.grad.float(), wide_VD.grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "waiting", [1, 5, 12, K]
)  # tokens whose gradients wait; 1: a chunk is more, as of 150,000 words
def test_bf16_gradients_that_wait_for_others_are_all_added(
    waiting: int, head: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "_WAITING_BYTES", 2 * V * waiting)
    hidden_KD, weight_VD = (tensor.bfloat16().requires_grad_() for tensor in head[:2])
    for reduced in (
        chunked_linear_logprobs(hidden_KD, weight_VD, None, head[3], chunk=5)[0].sum(),
        chunked_linear_logprob_sum(hidden_KD, weight_VD, None, head[3], torch.ones(K), chunk=5),
    ):
        wide = [tensor.detach().float().requires_grad_() for tensor in (hidden_KD, weight_VD)]
        expected = torch.autograd.grad(plain(*wide, None, head[3], 1.0, None)[0].sum(), wide)
        for found, right in zip(torch.autograd.grad(reduced, (hidden_KD, weight_VD)), expected, strict=True):
            torch.testing.assert_close(found.float(), right, rtol=0.05, atol=0.05)


def test_under_autocast_the_projection_takes_its_dtype(head: tuple[Tensor, ...]) -> None:
    hidden_KD, weight_VD, _, targets_K = head
    hidden_KD.requires_grad_()
    weight_VD.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours_K, _ = chunked_linear_logprobs(hidden_KD, weight_VD, None, targets_K, 5)
        logits_KV = torch.nn.functional.linear(hidden_KD, weight_VD)
    assert ours_K.dtype == torch.float32
    torch.testing.assert_close(ours_K, selected_logprobs(logits_KV, targets_K), atol=1e-5, rtol=0)
    ours_K.sum().backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.dtype == torch.float32


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("weight_trained", [True, False])
def test_tokens_by_vocabulary_is_never_built(weight_trained: bool) -> None:
    hidden_KD = torch.randn(64, 4, requires_grad=True)
    weight_VD = torch.randn(101, 4, requires_grad=weight_trained)
    with _LargestTensor() as watch:
        logps_K, entropy_K = chunked_linear_logprobs(
            hidden_KD, weight_VD, None, torch.zeros(64, dtype=torch.long), 8, entropy_grad=True
        )
        (logps_K.sum() + entropy_K.sum()).backward()
    assert watch.numel == 8 * 101


def test_without_gradients_nothing_is_kept(head: tuple[Tensor, ...]) -> None:
    hidden_KD, weight_VD, bias_V, targets_K = head
    with torch.no_grad():
        logps_K, _ = chunked_linear_logprobs(hidden_KD.requires_grad_(), weight_VD, bias_V, targets_K)
    assert logps_K.grad_fn is None


def test_no_tokens_at_all(head: tuple[Tensor, ...]) -> None:
    hidden_KD, weight_VD, bias_V, targets_K = head
    weight_VD.requires_grad_()
    logps_K, entropy_K = chunked_linear_logprobs(hidden_KD[:0], weight_VD, bias_V, targets_K[:0])
    assert logps_K.shape == entropy_K.shape == (0,)
    logps_K.sum().backward()
    assert weight_VD.grad is not None
    assert (weight_VD.grad == 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bf16_on_a_gpu_equals_fp32_on_the_same_values(head: tuple[Tensor, ...]) -> None:
    hidden_KD, weight_VD, _, targets_K = (t.cuda() for t in head)
    hidden_KD, weight_VD = (t.bfloat16().requires_grad_() for t in (hidden_KD, weight_VD))
    ours_K, _ = chunked_linear_logprobs(hidden_KD, weight_VD, None, targets_K, 5)
    theirs_K, _ = plain(hidden_KD.float(), weight_VD.float(), None, targets_K, 1.0, None)
    torch.testing.assert_close(ours_K, theirs_K, atol=1e-4, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad(ours_K.sum(), [hidden_KD, weight_VD]),
        torch.autograd.grad(theirs_K.sum(), [hidden_KD, weight_VD]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_sums_and_means_by_sequence() -> None:
    values_K = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    index_K = torch.tensor([2, 0, 2, 2])
    assert sum_by_sequence(values_K, index_K, 4).tolist() == [2, 0, 8, 0]
    assert mean_by_sequence(values_K, index_K, 4).tolist() == pytest.approx([2, 0, 8 / 3, 0])
    sum_by_sequence(values_K, index_K, 4)[2].backward()
    assert values_K.grad is not None
    assert values_K.grad.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("chunk", [1, 5, K, 1000])
@pytest.mark.parametrize("trained", ["nothing", "hidden", "all", "weight", "bias"])
def test_a_sum_is_the_plain_sum_with_gradients(head: tuple[Tensor, ...], chunk: int, trained: str) -> None:
    *inputs, targets_K = head
    for name, tensor in zip(("hidden", "weight", "bias"), inputs, strict=True):
        tensor.requires_grad_(trained in (name, "all"))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    weights_K = torch.linspace(-1, 1, K)
    ours = chunked_linear_logprob_sum(*inputs, targets_K, weights_K, chunk)
    theirs = (plain(*inputs, targets_K, 1.0, None)[0] * weights_K).sum()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    assert ours.requires_grad == bool(wanted)
    if not wanted:
        return
    for our_grad, their_grad in zip(
        torch.autograd.grad(-0.3 * ours, wanted), torch.autograd.grad(-0.3 * theirs, wanted), strict=True
    ):
        torch.testing.assert_close(our_grad, their_grad, atol=1e-5, rtol=1e-5)


def test_a_sum_in_double_passes_gradcheck_and_an_empty_one_is_0(head: tuple[Tensor, ...]) -> None:
    inputs, targets_K = [tensor.double().requires_grad_() for tensor in head[:3]], head[3]

    def total(*tensors: Tensor) -> Tensor:
        return chunked_linear_logprob_sum(*tensors, targets_K, torch.linspace(0, 2, K), 7)

    assert torch.autograd.gradcheck(total, inputs)
    nothing = chunked_linear_logprob_sum(inputs[0][:0], *inputs[1:], targets_K[:0], torch.zeros(0))
    nothing.backward()
    assert nothing.item() == 0
    assert not inputs[1].grad.any()


def test_a_sum_s_scale_is_not_rounded_to_bf16(head: tuple[Tensor, ...]) -> None:
    # 1/300 in bf16 is 0.2 % less: every gradient would be bent the same way.
    hidden_KD, weight_VD = (tensor.bfloat16().requires_grad_() for tensor in head[:2])
    gradients = []
    for scale in (1.0, 1 / 300):
        total = chunked_linear_logprob_sum(hidden_KD, weight_VD, None, head[3], torch.ones(K), 5)
        gradients.append([x.float() for x in torch.autograd.grad(total * scale, (hidden_KD, weight_VD))])
    for whole, part in zip(*gradients, strict=True):
        assert (300 * (part * whole).sum() / (whole * whole).sum()).item() == pytest.approx(1, abs=8e-4)
        torch.testing.assert_close(part * 300, whole, atol=1e-4, rtol=0.01)  # each rounded once


def test_a_sum_multiplies_by_the_head_three_times(head: tuple[Tensor, ...]) -> None:
    # In bf16, where no product is added in place, which the counter would not see.
    hidden_KD, weight_VD, bias_V = (tensor.bfloat16().requires_grad_() for tensor in head[:3])
    with FlopCounterMode(display=False) as counted:
        chunked_linear_logprob_sum(hidden_KD, weight_VD, bias_V, head[3], torch.ones(K), 5).backward()
    assert counted.get_total_flops() == 3 * 2 * K * D * V


def test_shapes_that_do_not_fit_are_refused(head: tuple[Tensor, ...]) -> None:
    hidden_KD, weight_VD, bias_V, targets_K = head
    with pytest.raises(ValueError, match="do not fit"):
        chunked_linear_logprobs(hidden_KD, weight_VD, bias_V, targets_K[:-1])
    with pytest.raises(ValueError, match="positive"):
        chunked_linear_logprobs(hidden_KD, weight_VD, bias_V, targets_K, 0)
    with pytest.raises(ValueError, match="positive"):
        chunked_linear_logprobs(hidden_KD, weight_VD, bias_V, targets_K, temperature=0)
    with pytest.raises(ValueError, match="differ"):
        chunked_linear_logprob_sum(hidden_KD, weight_VD, bias_V, targets_K, torch.ones(1))
    with pytest.raises(ValueError, match="last dimension"):
        selected_logprobs(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must both be \(K,\)"):
        sum_by_sequence(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), 2)
