"""From a recipe to transformers' arguments: defaults by stage and kind of training, and refusals in one line."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch

from chatalign.engine.defaults import LEARNING_RATES, learning_rate
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.memory import give_back_freed
from chatalign.engine.stage import last_means, training_arguments
from chatalign.errors import RecipeError
from chatalign.recipe.stages import STAGES

from .stand_ins import lm_rows, make_run, make_trainer, sft_recipe, weights


def test_every_training_stage_has_a_learning_rate_ten_times_higher_for_lora(tmp_path: Path) -> None:
    assert set(LEARNING_RATES) == set(STAGES) - {"eval"}
    recipe = sft_recipe(tmp_path, learning_rate=None)
    assert (learning_rate(recipe, is_adapter=False), learning_rate(recipe, is_adapter=True)) == (2e-5, 2e-4)
    assert learning_rate(sft_recipe(tmp_path, learning_rate=0.5), is_adapter=True) == 0.5


def test_arguments_are_the_recipes(tmp_path: Path) -> None:
    recipe = sft_recipe(tmp_path, weight_decay=0.1, warmup_steps=0.25, seed=7, save_total_limit=3)
    args = training_arguments(recipe, make_run(tmp_path), is_adapter=False)
    assert (args.weight_decay, args.warmup_steps, args.seed, args.max_grad_norm) == (0.1, 0.25, 7, 1.0)
    assert args.output_dir == str(tmp_path / "checkpoints")
    assert not args.logging_nan_inf_filter
    assert args.report_to == []


@pytest.mark.parametrize("change", [{"optim": "adamm"}, {"lr_scheduler_type": "cosyne"}])
def test_values_that_transformers_refuses_are_one_line(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"^`train`: .*"):
        training_arguments(sft_recipe(tmp_path, **change), make_run(tmp_path), is_adapter=False)


def test_last_means_are_the_last_of_each(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lm_rows(4), eval_rows=lm_rows(2), eval_strategy="epoch", num_train_epochs=2)
    trainer.train()
    found = last_means(trainer)
    assert {"loss", "perplexity", "grad_norm", "eval_loss", "eval_perplexity"} == set(found)
    assert found["loss"] == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def trained(folder: Path, **changes: bool) -> LmTrainer:
    trainer = make_trainer(folder, lm_rows(6), **changes)
    trainer.train()
    return trainer


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    plain, checkpointed = trained(tmp_path / "a"), trained(tmp_path / "b", gradient_checkpointing=True)
    for name, values in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], values, atol=1e-6, rtol=1e-5)


def test_bfloat16_computes_in_half_and_keeps_full_weights(tmp_path: Path) -> None:
    plain, half = trained(tmp_path / "a"), trained(tmp_path / "b", bf16=True)
    first = [trainer.state.log_history[0]["loss"] for trainer in (plain, half)]
    assert first[1] == pytest.approx(first[0], rel=1e-2)
    assert first[1] != first[0]
    assert {values.dtype for values in weights(half).values()} == {torch.float32}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_is_given_back() -> None:
    torch.ones(2**22, dtype=torch.uint8)  # and freed: from now on glibc takes blocks of 4 MiB from its heap
    blocks = [torch.ones(2**20, dtype=torch.uint8) for _ in range(200)]
    full = resident_mb()
    blocks[:] = blocks[19::20]  # some are above all others: the heap's end can't be drawn in
    assert full - resident_mb() < 50
    give_back_freed()
    assert full - resident_mb() > 150
    assert all(block.all() for block in blocks)
