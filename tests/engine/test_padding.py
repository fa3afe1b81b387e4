"""Lengths rounded up change no number: of a batch, of the loss head, of what a run counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_llama

from chatalign.data.collate import collate_lm, collate_pairs, pad_to_multiple
from chatalign.engine import loss_head, trainer
from chatalign.engine.attention import plan_segments
from chatalign.engine.batching import Bins, CollateItems, count_tokens, to_device
from chatalign.engine.isolation import enable_segments
from chatalign.engine.loss_head import enable_chunked_head, token_logprobs

from .stand_ins import VOCABULARY, lm_rows, make_trainer, pair_rows

PADDED = {"input_ids", "position_ids", "segments"}


@pytest.mark.parametrize("multiple", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("pairs", [False, True])
def test_padding_is_segments_of_its_own_at_the_end(pairs: bool, multiple: int) -> None:
    batch = collate_pairs(list(pair_rows(3))) if pairs else collate_lm(list(lm_rows(3)))
    before = {name: values.clone() for name, values in batch.items()}
    padded = pad_to_multiple(batch, multiple)
    length = batch["input_ids"].shape[1]
    total = padded["input_ids"].shape[1]
    assert total % multiple == 0
    assert 0 <= total - length < multiple
    assert batch.keys() == padded.keys() == before.keys()
    for name, values in before.items():
        assert torch.equal(batch[name], values)
        assert padded[name].dtype == values.dtype
        if name not in PADDED:
            assert torch.equal(padded[name], values)
    assert torch.equal(padded["input_ids"][:, :length], batch["input_ids"])
    assert torch.equal(padded["position_ids"][:, :length], batch["position_ids"])
    assert not padded["input_ids"][:, length:].any()
    longest = int((batch["segments"][:, 1] - batch["segments"][:, 0]).max())
    starts = range(length, total, longest)
    assert padded["position_ids"][0, length:].tolist() == [i % longest for i in range(total - length)]
    own = [[start, min(start + longest, total), 0, 0] for start in starts]
    assert padded["segments"].tolist() == batch["segments"].tolist() + own
    assert sum(plan_segments(padded["segments"], total).lengths) == total


def test_padding_by_hand() -> None:
    batch = collate_lm([{"input_ids": [7, 8, 9], "supervised": [0, 1, 1]}])
    padded = pad_to_multiple(batch, 4)
    assert padded["input_ids"].tolist() == [[7, 8, 9, 0]]
    assert padded["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert padded["segments"].tolist() == [[0, 3, 0, 0], [3, 4, 0, 0]]
    assert padded["targets"].tolist() == [8, 9]
    assert pad_to_multiple(batch, 3) is batch
    padded = pad_to_multiple(batch, 10)
    assert padded["segments"].tolist() == [[0, 3, 0, 0], [3, 6, 0, 0], [6, 9, 0, 0], [9, 10, 0, 0]]
    assert padded["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]


def test_padding_changes_no_log_probability_and_no_gradient() -> None:
    model = make_llama(VOCABULARY)
    enable_segments(model)
    batch = collate_pairs(list(pair_rows(3)))
    results = []
    for one in (batch, pad_to_multiple(batch, 64)):
        model.zero_grad()
        logps, _ = token_logprobs(model, one)
        logps.square().sum().backward()
        results.append((logps, [p.grad.clone() for p in model.parameters()]))
    (logps, gradients), (padded_logps, padded_gradients) = results
    torch.testing.assert_close(padded_logps, logps, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(padded_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_batch_counts_its_rows_own_tokens() -> None:
    rows = lm_rows(3)
    own = sum(map(len, rows["input_ids"]))
    bins = Bins(rows, [[0, 2], [1]])
    items = [bins[0], bins[1]]
    batch = CollateItems(collate_lm, 50)(items)
    assert batch["input_ids"].shape[1] % 50 == 0
    assert batch["input_ids"].numel() > own
    assert batch["num_tokens"] == count_tokens(batch) == own
    assert count_tokens(to_device(batch, torch.device("cpu"))) == own
    assert batch["filler"] is False
    plain = CollateItems(collate_lm)(items)
    assert plain["input_ids"].numel() == plain["num_tokens"] == count_tokens(plain) == own
    assert count_tokens(collate_lm(list(rows))) == own  # a batch that no loader made


# The loss head


def logps_and_gradients(model: Any, batch: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, entropy = token_logprobs(model, batch, temperature=0.7, **options)
    weights = torch.linspace(0.5, 1.5, len(logps))
    loss = (weights * logps).sum()
    if entropy is not None:
        loss = loss + (weights * entropy).sum()
    loss.backward()
    found = [logps.detach()] if entropy is None else [logps.detach(), entropy.detach()]
    return found + [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("options", [{}, {"entropy": True, "entropy_grad": True}])
def test_rounding_the_targets_up_changes_nothing(
    options: dict[str, bool], chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama(VOCABULARY)
    enable_segments(model)
    if chunked:
        enable_chunked_head(model)
        monkeypatch.setattr(loss_head, "_PLAIN_LOGITS_BYTES", 0)
    batch = collate_pairs(list(pair_rows(4)))  # a prompt's last token predicts twice, as the repeated target does
    kept = []
    run = loss_head._token_logprobs
    monkeypatch.setattr(loss_head, "_token_logprobs", lambda *args: kept.append(len(args[1]["targets"])) or run(*args))
    rounded = logps_and_gradients(model, batch, **options)
    monkeypatch.setattr(loss_head, "HALF_MULTIPLE", 1)
    plain = logps_and_gradients(model, batch, **options)
    assert kept == [128, len(batch["targets"])]
    assert len(rounded[0]) == len(batch["targets"]) < 128
    torch.testing.assert_close(rounded[0], plain[0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(rounded[1:], plain[1:], strict=True):
        assert float((ours - theirs).norm()) <= 0.01 * float(theirs.norm())  # sums in bf16, in another order


def test_targets_of_a_full_multiple_and_fp32_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(VOCABULARY)
    enable_segments(model)
    batch = collate_lm(list(lm_rows(2)))
    kept = []
    run = loss_head._token_logprobs
    monkeypatch.setattr(loss_head, "_token_logprobs", lambda *args: kept.append(len(args[1]["targets"])) or run(*args))
    expected = len(batch["targets"])
    token_logprobs(model, batch)
    monkeypatch.setattr(loss_head, "HALF_MULTIPLE", expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _ = token_logprobs(model, batch)
    assert kept == [expected, expected]
    assert len(logps) == expected


@pytest.mark.parametrize("entropy", [False, True])
def test_a_batch_without_targets(entropy: bool) -> None:
    model = make_llama(VOCABULARY)
    enable_segments(model)
    batch = collate_lm([{"input_ids": [5, 6, 7], "supervised": [0, 0, 0]}])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, entropies = token_logprobs(model, batch, entropy=entropy)
    assert logps.shape == (0,)
    assert (entropies is not None and entropies.shape == (0,)) if entropy else entropies is None
    logps.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


# A run


def test_a_run_in_bf16_counts_tokens_without_the_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lm_rows(6)
    lengths = []
    objective = trainer.StageTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(inputs["input_ids"].shape[1])
        return objective(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "compute_loss", watched)
    half = make_trainer(tmp_path / "half", rows, bf16=True)
    whole = make_trainer(tmp_path / "whole", rows, bf16=False)
    tokens = []
    for one in (half, whole):
        one.train()
        tokens.append([entry["tokens"] for entry in one.state.log_history if "tokens" in entry])
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 3
    assert tokens[0][-1] == sum(map(len, rows["input_ids"])) == half.state.num_input_tokens_seen
    assert half.state.total_flos == whole.state.total_flos
    assert lengths[:3] == [128] * 3
    assert max(lengths[3:]) < 128
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (half, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_run_in_bf16_rounds_its_targets_up(tmp_path: Path) -> None:
    # accelerate's autocast is on within the model's forward pass alone, so that the batch's code doesn't see it.
    seen: dict[bool, list[int]] = {True: [], False: []}
    for bf16, counts in seen.items():
        one = make_trainer(tmp_path / str(bf16), lm_rows(6), bf16=bf16)
        head = one.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _layer, inputs, counts=counts: counts.append(inputs[0].shape[-2]))
        one.train()
    assert set(seen[True]) == {128}
    assert 0 < max(seen[False]) < 128


def small_window() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return MistralForCausalLM(
        MistralConfig(vocab_size=VOCABULARY, num_hidden_layers=2, sliding_window=16, pad_token_id=0, **shape)
    )


def small_position_table() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2, pad_token_id=0)
    )


@pytest.mark.parametrize("make", [small_window, small_position_table])
def test_a_model_that_sees_no_further_than_its_rows_trains_in_bf16(make: Any, tmp_path: Path) -> None:
    losses = []
    for bf16 in (True, False):
        torch.manual_seed(0)
        model = make()
        for module in model.modules():  # GPT-2's own default is not 0
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rows = lm_rows(6, longest=17)
        one = make_trainer(tmp_path / str(bf16), rows, model=model, eval_rows=rows, bf16=bf16)
        one.train()
        losses.append([entry["loss"] for entry in one.state.log_history if "loss" in entry])
        losses[-1].append(one.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("make", [small_window, small_position_table])
def test_padded_pairs_fit_where_they_fit_unpadded(make: Any) -> None:
    model = make().eval()
    enable_segments(model)
    batch = collate_pairs(list(pair_rows(3, shortest=6)))  # 8 + 8 tokens at the most
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain, _ = token_logprobs(model, batch)
        padded, _ = token_logprobs(model, pad_to_multiple(batch, 128))
    torch.testing.assert_close(padded, plain, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("count", [3, 5])
def test_evaluation_in_bf16_leaves_the_padding_out(count: int, tmp_path: Path) -> None:
    rows = lm_rows(count, seed=1)
    losses = [
        make_trainer(tmp_path / str(bf16), lm_rows(2), eval_rows=rows, bf16=bf16).evaluate()["eval_loss"]
        for bf16 in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
