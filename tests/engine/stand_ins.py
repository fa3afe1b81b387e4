"""Rows, recipes and trainers of the engine's tests: no files, no templates, a 50k-parameter Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from tiny import make_llama, make_tokenizer

from chatalign.data.collate import collate_lm
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.stage import training_arguments
from chatalign.recipe import SftRecipe
from chatalign.runs import Run

VOCABULARY = 96


def lm_rows(count: int, *, seed: int = 0, longest: int = 24) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest, (count,), generator=generator).tolist()
    ids = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "supervised": [[0] * (n // 3) + [1] * (n - n // 3) for n in lengths]}
    )


def pair_rows(count: int, *, seed: int = 0, shortest: int = 2) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[int]:
        length = int(torch.randint(shortest, 9, (1,), generator=generator))
        return torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()

    return datasets.Dataset.from_list(
        [{"prompt_ids": draw(), "chosen_ids": draw(), "rejected_ids": draw()} for _ in range(count)]
    )


def sft_recipe(folder: Path, **train: Any) -> SftRecipe:
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 100,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "use_cpu": True,
        **train,
    }
    return SftRecipe.model_validate(
        {
            "stage": "sft",
            "output_dir": str(folder),
            "model": {"name_or_path": "tiny"},
            "data": {"datasets": [{"path": "rows.jsonl"}], "max_length": 32, "packing": False},
            "train": settings,
        }
    )


def make_run(folder: Path, run_id: str = "run1") -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder=folder, run_id=run_id, fingerprint="f", parents=[])


def make_trainer(
    folder: Path,
    rows: datasets.Dataset,
    *,
    eval_rows: datasets.Dataset | None = None,
    packing: bool = False,
    trainer_class: type[LmTrainer] = LmTrainer,
    model: Any = None,
    **train: Any,
) -> LmTrainer:
    recipe = sft_recipe(folder, **train)
    if packing:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": True})})
    run = make_run(folder)
    return trainer_class(
        recipe=recipe,
        run=run,
        args=training_arguments(recipe, run, is_adapter=False),
        model=make_llama(VOCABULARY) if model is None else model,
        tokenizer=make_tokenizer(),
        train_rows=rows,
        eval_rows=eval_rows,
        collate=collate_lm,
    )


def weights(trainer: LmTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
