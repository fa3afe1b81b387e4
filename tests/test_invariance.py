"""What must not move a run: each stage, with one thing changed that says how to compute and not what, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_fused_layers import plain_rotary
from same_steps import (
    BAR,
    LORA,
    NATIVE,
    PREPARED,
    Line,
    assert_same_steps,
    assert_zero_mean,
    recipe_of,
    run,
    write_rows,
)
from torch import Tensor
from transformers.models.llama import modeling_llama
from whole_row_attention import Kernel, eager, over_the_row, sdpa

from chatalign.engine import attention, batching, lm_trainer, trainer
from chatalign.engine.loss_head import sum_of_logprobs
from chatalign.merge import merge as merge_adapter
from chatalign.recipe.load import merge

Steps = Callable[..., list[Line]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, rows: Path, tiny_model_folder: Path) -> Steps:
    """`steps(stage, over)`: what a run logs at each step."""

    def made(stage: str, over: Mapping[str, Any] | None = None) -> list[Line]:
        folder = Path((over or {}).get("output_dir") or tmp_path_factory.mktemp(stage) / "run")
        return run(recipe_of(stage, over or {}, folder=folder, rows=rows, model=tiny_model_folder))

    return made


@pytest.fixture(scope="module")
def baseline(steps: Steps) -> Steps:
    """`baseline(stage)`: the run without a change, made once."""
    made: dict[str, list[Line]] = {}

    def of(stage: str) -> list[Line]:
        if stage not in made:
            made[stage] = steps(stage)
        return made[stage]

    return of


# How a step is cut


@pytest.mark.parametrize("stage", NATIVE)
@pytest.mark.parametrize("size", [2, 1])
def test_accumulation(stage: str, size: int, steps: Steps, baseline: Steps) -> None:
    over = {"per_device_train_batch_size": size}
    if stage != "ppo":  # there the minibatch is given, and the accumulation follows
        over["gradient_accumulation_steps"] = 4 // size
    assert_same_steps(steps(stage, {"train": over}), baseline(stage))


@pytest.mark.parametrize(("stage", "capacity"), [("pretrain", 48), ("sft", 96)])
def test_packing(stage: str, capacity: int, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The padded run is given, step by step, the rows that the packed run's bins held."""
    assert_same_steps(*packed_and_padded(stage, capacity, steps, monkeypatch))


def rows_of_bins(bins: batching.Bins) -> list[list[int]]:
    """The rows of a packed run's bins, one a micro-batch, in the order of its first epoch."""
    order = batching.BinSampler(len(bins), batch_size=1, seed=42).stretches()
    return [list(bins.bins[bin_]) for (bin_,) in order]


def follow(planned: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give an unpacked run these rows, micro-batch by micro-batch."""
    monkeypatch.setattr(batching.BinSampler, "stretches", lambda _self: iter(planned))
    monkeypatch.setattr(batching.BinSampler, "__len__", lambda _self: len(planned))


def padded_logprobs(model: Any, batch: dict[str, Any]) -> Tensor:
    """Σ log p of a flat batch's targets from a rectangle of its rows, padded, through plain masked attention."""
    starts, ends = batch["segments"][:, 0], batch["segments"][:, 1]
    mask = torch.arange(int((ends - starts).max())) < (ends - starts)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, batch["input_ids"])
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    logps = logits[mask][batch["predict_positions"]].log_softmax(-1)
    return logps.gather(1, batch["targets"][:, None]).sum()


def packed_and_padded(
    stage: str, capacity: int, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Line], list[Line]]:
    kept: list[batching.Bins] = []
    make_bins = batching.make_bins
    monkeypatch.setattr(trainer, "make_bins", lambda *args: kept.append(make_bins(*args)) or kept[-1])
    over: dict[str, Any] = {"data": {"packing": True, "max_length": capacity}}
    over["train"] = {"per_device_train_batch_size": 1, "max_steps": 4}
    packed = steps(stage, over)
    assert max(map(len, kept[0].bins)) > 2
    planned = rows_of_bins(kept[0])
    follow(planned, monkeypatch)
    monkeypatch.setattr(lm_trainer, "sum_of_logprobs", padded_logprobs)
    padded = steps(stage, merge(over, {"data": {"packing": False}}))
    assert len(kept[-1]) == sum(map(len, planned))  # a row a bin
    assert [line["tokens"] for line in padded] == [line["tokens"] for line in packed]
    return packed, padded


# How a step is computed


@pytest.mark.parametrize("stage", NATIVE)
@pytest.mark.parametrize("whole", [eager, sdpa], ids=["eager", "sdpa"])
def test_attention(stage: str, whole: Kernel, steps: Steps, baseline: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own kernels over the whole row with a T × T mask, in place of ours segment by segment."""
    theirs, rows_seen = baseline(stage), list[int]()
    monkeypatch.setattr(attention, "_segment_by_segment", over_the_row(whole, rows_seen))
    assert_same_steps(steps(stage), theirs)
    assert max(rows_seen) >= 4


@pytest.mark.parametrize("stage", NATIVE)
@pytest.mark.parametrize("train", [{"gradient_checkpointing": True}, {"fused_layers": False}], ids=str)
def test_levers(
    stage: str, train: dict[str, bool], steps: Steps, baseline: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = baseline(stage)
    if "fused_layers" in train:  # fused layers leave their function in the modeling file
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", plain_rotary)
    assert_same_steps(steps(stage, {"train": train}), theirs)


@pytest.mark.parametrize("stage", PREPARED)
def test_workers_of_the_loader_change_no_bit(stage: str, steps: Steps, baseline: Steps) -> None:
    own = steps(stage, {"train": {"dataloader_num_workers": 2}})
    for mine, theirs in zip(own, baseline(stage), strict=True):
        for name in mine.keys() - {"time_s", "tokens_per_s"}:
            assert mine[name] == theirs[name], name


# Adapter and merged model


@pytest.fixture(scope="module")
def starts(steps: Steps, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An SFT adapter that has moved, and the same merged into its base."""
    folder = tmp_path_factory.mktemp("starts")
    train = {"optim": "adamw_torch_fused", "learning_rate": 3e-2, "max_steps": 8}
    steps("sft", {"output_dir": str(folder / "adapter"), "lora": LORA, "train": train})
    return folder / "adapter", merge_adapter(folder / "adapter", folder / "merged")


@pytest.mark.parametrize("stage", NATIVE)
def test_a_run_starts_from_the_merged_model_as_from_its_adapter(
    stage: str, steps: Steps, starts: tuple[Path, Path], tiny_model_folder: Path
) -> None:
    """The first step's metrics, before any update: the loss, DPO's and PPO's reference, PPO's rollout and values."""
    ours, theirs, base = (
        steps(stage, {"model": {"name_or_path": str(start)}, "lora": LORA, "train": {"max_steps": 1}})[0]
        for start in (*starts, tiny_model_folder)
    )
    # The gradient norm is of other weights: those of an adapter that has moved, and of a new one.
    measured = {name for name in ours if not name.startswith("speed/")} - {"grad_norm", "time_s", "tokens_per_s"}
    for name in measured:
        assert ours[name] == pytest.approx(theirs[name], rel=BAR, abs=BAR), name
    told = {"dpo": "logps/chosen"}.get(stage, "loss")  # DPO's first loss is ln 2 whatever the model
    assert theirs[told] != pytest.approx(base[told], rel=1e-3)


# These comparisons can fail


def test_residuals_of_one_sign_are_found() -> None:
    assert_zero_mean(torch.tensor([3e-6, -2e-6, 1e-6, -3e-6, 2e-6]))
    assert_zero_mean(torch.tensor([1e-7] * 5))
    with pytest.raises(AssertionError, match="lean to one side"):
        assert_zero_mean(torch.tensor([3e-6, 2e-6, 2.5e-6, 3e-6, 2e-6]))


def test_a_mean_over_micro_batches_is_found(steps: Steps, baseline: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_of_means(self: Any, model: Any, batch: Any, _num_items: Any) -> Any:
        return -sum_of_logprobs(model, batch) / batch["targets"].numel() / self.args.gradient_accumulation_steps, {}

    theirs = baseline("sft")
    monkeypatch.setattr(lm_trainer.LmTrainer, "objective", mean_of_means)
    assert_same_steps(steps("sft"), theirs)  # right where a step is one micro-batch
    cut = steps("sft", {"train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}})
    with pytest.raises(AssertionError, match="loss: "):
        assert_same_steps(cut, theirs)


def test_a_bias_far_below_the_bar_is_found(steps: Steps, baseline: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = lm_trainer.LmTrainer.objective

    def heavier(self: Any, model: Any, batch: Any, num_items: Any) -> Any:
        return objective(self, model, batch, num_items / (1 + 3e-6))

    theirs = baseline("sft")
    monkeypatch.setattr(lm_trainer.LmTrainer, "objective", heavier)
    with pytest.raises(AssertionError, match="lean to one side"):
        assert_same_steps(steps("sft"), theirs)


def test_packed_rows_that_see_one_another_are_found(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention._segment_by_segment

    def leaks(query: Tensor, key: Tensor, value: Tensor, plan: Any, dropout: float, scaling: Any, softcap: Any) -> Any:
        if query.shape[2] < 30:  # the start-up check's, which would refuse it
            return own(query, key, value, plan, dropout, scaling, softcap)
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        return sdpa(query, key, value, mask[None, None], scaling)

    monkeypatch.setattr(attention, "_segment_by_segment", leaks)
    packed, padded = packed_and_padded("sft", 96, steps, monkeypatch)
    with pytest.raises(AssertionError, match="loss: "):
        assert_same_steps(packed, padded)
