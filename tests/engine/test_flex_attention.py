"""FlexAttention's masks and the choice of a kernel, as far as a CPU can tell: the kernel itself runs on GPUs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as flex_attention_call

from chatalign.engine import flex_attention, varlen_attention
from chatalign.engine.attention import SegmentPlan, plan_segments, segment_attention_forward, segment_inputs
from chatalign.engine.isolation import enable_segments, runs_segments
from chatalign.errors import ModelError
from engine.test_attention import flat_pair, make_model

CPU = torch.device("cpu")


def plan_of(*segments: tuple[int, int | None]) -> SegmentPlan:
    """A plan from (length, index of the prefix)."""
    ends, table = [0], []
    for length, prefix in segments:
        before = (0, 0) if prefix is None else (ends[prefix], ends[prefix + 1])
        table.append([ends[-1], ends[-1] + length, *before])
        ends.append(ends[-1] + length)
    return plan_segments(torch.tensor(table), ends[-1])


PLANS = {
    "documents": plan_of((5, None), (300, None), (1, None), (150, None)),
    "pair": plan_of((200, None), (90, 0), (270, 0)),
    "pairs": plan_of((3, None), (4, 0), (2, 0), (260, None), (140, 3), (1, 3)),
    "one": plan_of((128, None)),
    "blocks": plan_of((256, None), (384, 0)),
}


def by_hand(plan: SegmentPlan, window: int | None) -> torch.Tensor:
    """Who sees whom, from the words: itself causally, its prefix fully, not beyond the window."""
    total = sum(plan.lengths)
    owner = [i for i, length in enumerate(plan.lengths) for _ in range(length)]
    starts = [sum(plan.lengths[:i]) for i in range(len(plan.lengths))]
    seen = torch.zeros(total, total, dtype=torch.bool)
    for q, i in enumerate(owner):
        prefix = plan.prefixes[i]
        keys = list(range(starts[i], q + 1))
        if prefix is not None:
            keys = list(range(starts[prefix], starts[prefix] + plan.lengths[prefix])) + keys
        for key in keys if window is None else keys[-window:]:
            seen[q, key] = True
    return seen


@dataclass
class Layer:
    """What the entry reads of a module: nothing."""


def attend(plan: SegmentPlan, kernel: Any, *, softcap: float | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    total = sum(plan.lengths)
    query, key, value = (torch.randn(1, heads, total, 16, generator=generator) for heads in (4, 2, 2))
    return segment_attention_forward(Layer(), query, key, value, None, segments=plan, kernel=kernel, softcap=softcap)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("name", PLANS)
def test_mask_and_blocks_say_what_the_segments_say(name: str, window: int | None) -> None:
    plan = PLANS[name]
    seen, total = by_hand(plan, window), sum(plan.lengths)
    sees = flex_attention.visible(flex_attention.token_table(plan, CPU), window)
    places = torch.arange(total)
    nothing = torch.zeros((), dtype=torch.long)
    assert torch.equal(sees(nothing, nothing, places[:, None], places[None, :]), seen)

    some, full = flex_attention.block_table(plan, window)
    padding = -total % flex_attention.BLOCK
    blocks = F.pad(seen, (0, padding, 0, padding)).unfold(0, 128, 128).unfold(1, 128, 128).flatten(2)
    assert not (blocks.any(-1) & ~some).any()  # nothing that is seen is skipped
    assert not (full & ~blocks.all(-1)).any()  # nothing that is hidden is shown
    if window is None:  # and nothing is computed in vain
        assert torch.equal(some, blocks.any(-1))


def test_blocks_within_a_segment_and_its_prefix_need_no_mask() -> None:
    _, full = flex_attention.block_table(PLANS["blocks"], None)
    assert full.int().tolist() == [
        [0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
    ]


@pytest.mark.parametrize("name", PLANS)
def test_block_mask_is_pytorchs_own(name: str) -> None:
    plan = PLANS[name]
    total = sum(plan.lengths)
    ours = flex_attention.block_mask(plan, CPU)
    theirs = create_block_mask(ours.mask_mod, None, None, total, total, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.seq_lengths == (total, total)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", ["documents", "pair", "pairs"])
def test_flex_computes_what_segment_by_segment_does(name: str, softcap: float | None) -> None:
    with torch.no_grad():
        flex, sdpa = (attend(PLANS[name], kernel, softcap=softcap) for kernel in ("flex", "sdpa"))
    torch.testing.assert_close(flex, sdpa, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_compiled_kernel_serves_all_lengths(softcap: float | None) -> None:
    # On a CPU the compiled kernel has no backward pass; that it isn't compiled anew is the same compiler's word.
    score_mod = None if softcap is None else flex_attention._softcap(softcap)
    graphs = []
    for name in ("pair", "documents", "pairs", "blocks"):
        plan = PLANS[name]
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(1, heads, sum(plan.lengths), 16, generator=generator) for heads in (4, 2, 2)]
        settings = {"score_mod": score_mod, "block_mask": flex_attention.block_mask(plan, CPU), "enable_gqa": True}
        with torch.no_grad():
            compiled, plain = (run(*parts, **settings) for run in (flex_attention._compiled(), flex_attention_call))
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1]


def test_a_model_runs_the_kernel_that_it_is_set_to() -> None:
    model = make_model("llama").requires_grad_(False)
    expected = model(**segment_inputs(flat_pair())).logits if enable_segments(model) == {"sdpa"} else None
    assert enable_segments(model, "flex") == {"flex"}
    assert runs_segments(model)
    assert expected is not None
    torch.testing.assert_close(model(**segment_inputs(flat_pair())).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_kernel_that_cannot_run_is_refused_not_replaced() -> None:
    with pytest.raises(ModelError, match="varlen` runs on a GPU since"):
        attend(PLANS["pair"], "varlen")
    query, plan = torch.zeros(1, 1, 1, 16), plan_of((1, None))
    with pytest.raises(ModelError, match="flex` has no dropout"):
        segment_attention_forward(Layer(), query, query, query, None, dropout=0.1, segments=plan, kernel="flex")  # type: ignore[arg-type]


def test_flex_runs_rows_longer_than_the_window() -> None:
    plan = plan_of((30, None), (20, 0))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 50, 16, generator=generator) for _ in range(3))
    module = Layer()
    with torch.no_grad():
        output, _ = segment_attention_forward(
            module,
            query,
            key,
            value,
            None,
            segments=plan,
            kernel="flex",
            sliding_window=8,  # type: ignore[arg-type]
        )
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=by_hand(plan, 8))
    torch.testing.assert_close(output.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="sliding window of 8"):
        segment_attention_forward(module, query, key, value, None, segments=plan, sliding_window=8)  # type: ignore[arg-type]


def test_no_gpu_is_no_flex_and_is_not_an_error(caplog: pytest.LogCaptureFixture) -> None:
    shape: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": torch.float32, "softcap": None}
    with caplog.at_level(logging.WARNING):
        assert not flex_attention.works(**shape, device=CPU)
    assert not caplog.records


def test_varlen_table_gathers_a_prefix_before_each_reply() -> None:
    table = varlen_attention.varlen_table(plan_of((3, None), (2, 0), (4, 0)), CPU)
    assert table.cu_seq_q.tolist() == [0, 3, 5, 9]
    assert table.cu_seq_k.tolist() == [0, 3, 8, 15]
    assert table.key_index is not None
    assert table.key_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert (table.max_q, table.max_k) == (4, 7)


def test_under_autocast_queries_and_keys_come_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rotary embedding gives float32 back: a GPU would then never run the half-precision kernel.
    seen: set[torch.dtype] = set()
    plain = flex_attention.attend

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any) -> torch.Tensor:
        seen.update((query.dtype, key.dtype, value.dtype))
        return plain(query, key, value, mask, **settings)

    model = make_model("qwen3")
    with torch.no_grad():
        enable_segments(model, "flex")
    monkeypatch.setattr(flex_attention, "attend", spy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**segment_inputs(flat_pair()))
    assert seen == {torch.bfloat16}
