"""A single plain LoRA adapter is fused; every other use of adapters goes PEFT's own way and gives its result."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from chatalign.engine.fused_layers import fuse_layers
from chatalign.maths import fused

from .fused_twins import IDS, add_lora, assert_close, logits_of, make_model, results


@pytest.fixture
def lora_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each fused LoRA product."""
    calls: list[int] = []
    lora_linear = fused.lora_linear
    monkeypatch.setattr(fused, "lora_linear", lambda *args: calls.append(1) or lora_linear(*args))
    return calls


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without biases and with
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_a_single_adapter_is_fused(name: str, options: dict[str, Any], lora_calls: list[int]) -> None:
    model = add_lora(make_model(name), **options)
    before = results(model)
    fuse_layers(model)
    assert lora_calls == []
    after = results(model)
    assert len(lora_calls) == 14  # seven a layer
    assert_close(after, before)
    assert {key.rsplit(".", 3)[1] for key in after[1]} == {"lora_A", "lora_B"}


_ADAPTERS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "trained biases": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True},
}


@pytest.mark.parametrize("kind", _ADAPTERS)
def test_other_kinds_of_adapters_go_pefts_own_way(kind: str, lora_calls: list[int]) -> None:
    model = add_lora(make_model("qwen2"), **_ADAPTERS[kind])
    fuse_layers(model)
    lora_calls.clear()
    twin = add_lora(make_model("qwen2"), **_ADAPTERS[kind])
    twin.load_state_dict(model.state_dict())
    for training in (False, True):
        torch.manual_seed(1)
        theirs = results(twin.train(training))
        torch.manual_seed(1)
        assert_close(results(model.train(training)), theirs)
    # Qwen 2 has biases in three of a layer's seven products alone.
    assert len(lora_calls) == (2 * 2 * 4 if kind == "trained biases" else 0)


def test_adapters_off_two_at_once_and_merged_go_pefts_own_way(lora_calls: list[int]) -> None:
    model = add_lora(make_model("llama"))
    base = results(make_model("llama"))[0]
    single = results(model)[0]
    fuse_layers(model)
    with model.disable_adapter(), torch.no_grad():
        off = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(off, base, atol=1e-5, rtol=1e-5)
    model.base_model.merge_adapter()
    torch.testing.assert_close(logits_of(model), single, atol=1e-4, rtol=1e-4)
    model.base_model.unmerge_adapter()
    assert lora_calls == []
    torch.testing.assert_close(logits_of(model), single, atol=1e-4, rtol=1e-4)
    assert len(lora_calls) == 14
    lora_calls.clear()

    add_lora(model, name="second")
    twin = add_lora(add_lora(make_model("llama")), name="second")
    twin.load_state_dict(model.state_dict())
    seen = []
    for names, fused_products in ((["default", "second"], 0), (["second"], 14), (["default"], 14)):
        for either in (model, twin):
            either.base_model.set_adapter(names)
        lora_calls.clear()
        ours = results(model)
        assert len(lora_calls) == fused_products
        assert_close(ours, results(twin))
        seen.append(ours[0])
    assert all((one - other).abs().max() > 1e-2 for one, other in combinations([*seen, base], 2))


def test_adapters_chosen_for_each_row_go_pefts_own_way(lora_calls: list[int]) -> None:
    model = add_lora(add_lora(make_model("llama")), name="second")
    fuse_layers(model)
    with torch.no_grad():
        mixed = model(input_ids=IDS, use_cache=False, adapter_names=["default", "second"]).logits
        assert lora_calls == []
        for row, name in enumerate(("default", "second")):
            model.base_model.set_adapter(name)
            alone = model(input_ids=IDS[row : row + 1], use_cache=False).logits[0]
            torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_some_layers_leaves_the_others_to_the_base(lora_calls: list[int]) -> None:
    model = add_lora(make_model("llama"), layers_to_transform=[1])
    before = results(model)
    assert fuse_layers(model) == 7 + 7
    assert_close(results(model), before)
    assert len(lora_calls) == 7
