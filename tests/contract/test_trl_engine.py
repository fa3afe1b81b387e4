"""TRL as the oracle: on the same rows and weights both engines have the same loss and the same gradients.

An upgrade of TRL, transformers or peft that changes the maths fails here. One module, so that TRL is imported once.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import make_llama, make_tokenizer

from chatalign import dpo, kto, reward, sft
from chatalign.data import Prepared
from chatalign.data.collate import collate_lm, collate_pairs
from chatalign.engine import trl_engine
from chatalign.engine.batching import CollateItems
from chatalign.engine.dpo_trainer import DpoTrainer
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.reward_trainer import RewardTrainer
from chatalign.engine.stage import Work, native_settings
from chatalign.models.heads import load_reward_model, new_score_head
from chatalign.models.reference import Reference
from chatalign.recipe.stages import STAGES
from chatalign.runs import Run

pytestmark = pytest.mark.slow
ROWS = 6


def draw(generator: torch.Generator, low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(4, 90, (length,), generator=generator).tolist()


def lm_rows() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = [draw(generator, 4, 20) for _ in range(ROWS)]
    marks = [[0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2) for ids in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "supervised": marks})


def pair_rows() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return datasets.Dataset.from_list([{name: draw(generator, 2, 12) for name in names} for _ in range(ROWS)])


def make_work(stage: str, folder: Path, rows: datasets.Dataset, model: Any, **section: Any) -> Work:
    raw: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(folder),
        "model": {"name_or_path": "tiny"},
        "data": {"datasets": [{"path": "rows.jsonl"}], "max_length": 64, "packing": False},
        "train": {"per_device_train_batch_size": ROWS, "use_cpu": True, "save_strategy": "no"},
    }
    if section:
        raw[stage] = section
    return Work(
        recipe=STAGES[stage].model_validate(raw),
        run=Run(folder=folder, run_id="run1", fingerprint="f", parents=[]),
        model=model,
        is_adapter=False,
        tokenizer=make_tokenizer(),
        rows=Prepared(train=rows, eval=None, used=[]),
    )


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert sum(float(gradient.norm()) for gradient in found.values()) > 0
    return found


def native_result(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    bins = trainer.train_dataset
    batch = CollateItems(trainer.collate)([bins[i] for i in range(len(bins))])
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=items)
    return float(loss), gradients(trainer.model, loss)


def trl_result(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) in (ROWS, 2 * ROWS)
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=items)
    return float(loss), gradients(trainer.model, loss)


def assert_same(native: Any, trl: Any) -> None:
    assert native[0] == pytest.approx(trl[0], rel=1e-4)
    assert native[1].keys() == trl[1].keys()
    for name, expected in trl[1].items():
        torch.testing.assert_close(native[1][name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-8)


def test_sft(tmp_path: Path) -> None:
    work = make_work("sft", tmp_path, lm_rows(), make_llama(96))
    twin = replace(work, model=copy.deepcopy(work.model))
    assert_same(
        native_result(LmTrainer(**native_settings(work), collate=collate_lm)),
        trl_result(trl_engine.sft_trainer(twin)),
    )


@pytest.mark.parametrize("coefficient", [None, 0.05])
def test_reward(tmp_path: Path, coefficient: float | None) -> None:
    from transformers import LlamaForSequenceClassification

    config = make_llama(96).config
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.score = new_score_head(config.hidden_size, seed=0)
    work = make_work("reward", tmp_path, pair_rows(), model, center_rewards_coefficient=coefficient)
    twin = replace(work, model=copy.deepcopy(model))
    assert_same(
        native_result(RewardTrainer(**native_settings(work), collate=collate_pairs)),
        trl_result(trl_engine.reward_trainer(twin)),
    )


@pytest.mark.parametrize(
    "section",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "sigmoid", "sft_weight": 0.7, "beta": 0.3},
        {"loss_type": "sigmoid", "precompute_ref_log_probs": True},
        {"loss_type": "sigmoid_norm"},
        {"loss_type": "hinge", "beta": 0.5},
        {"loss_type": "ipo"},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "exo_pair", "label_smoothing": 0.1},
        {"loss_type": "nca_pair"},
        {"loss_type": "sppo_hard"},
        {"loss_type": "apo_zero"},
        {"loss_type": "apo_down"},
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired"},
        {"loss_type": "bco_pair"},
        {"loss_type": "sft"},
        {"loss_type": "discopop"},
    ],
    ids=lambda section: "-".join(map(str, section.values())),
)
def test_dpo(tmp_path: Path, section: dict[str, Any]) -> None:
    start = make_llama(96).eval()
    policy = copy.deepcopy(start)
    torch.manual_seed(3)
    with torch.no_grad():  # away from the reference, where losses differ
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    work = make_work("dpo", tmp_path, pair_rows(), policy, **section)
    twin = replace(work, model=copy.deepcopy(policy))
    native = DpoTrainer(**native_settings(work), reference=Reference(policy, way="copy", module=copy.deepcopy(start)))
    native.model.train()
    native._checked = True  # the policy is not its reference here
    trl = trl_engine.dpo_trainer(twin, Reference(twin.model, way="copy", module=start))
    assert_same(native_result(native), trl_result(trl))


# The engines end to end, by the same recipes


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def trl_recipe(stage: str, folder: Path, rows: Path, model: Path | str, **train: Any) -> Any:
    raw: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(folder / stage),
        "model": {"name_or_path": str(model)},
        "data": {"datasets": [{"path": str(rows)}], "max_length": 64, "eval_fraction": 0.2},
        "train": {
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_strategy": "epoch",
            "max_steps": 6,
            "use_cpu": True,
            **train,
        },
    }
    if stage != "kto":
        raw["engine"] = "trl"
    if stage == "sft":
        raw["lora"] = {"r": 4, "lora_alpha": 8}
    return STAGES[stage].model_validate(raw)


def losses(recipe: Any) -> list[float]:
    lines = map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


_WORDS = ["hello", "world", "Paris", "thank you", "capital"]


def test_recipes_run_on_trl_and_hand_on(tmp_path: Path, tiny_model_folder: Path) -> None:
    both = [(a, b) for a in _WORDS for b in _WORDS]
    chats = [{"prompt": f"{a} {b}?", "completion": f"{b}."} for a, b in both]
    pairs = [{"prompt": f"{a} {b}?", "chosen": f"{b}.", "rejected": f"{a} no no"} for a, b in both]
    marked = [{"prompt": f"{a} {b}?", "completion": f"{b}.", "label": (len(a) + len(b)) % 2 == 0} for a, b in both]

    first = trl_recipe("sft", tmp_path, write_rows(tmp_path / "sft.jsonl", chats), tiny_model_folder)
    made = sft.run(first)
    assert made.kind == "adapter"
    assert losses(first)[-1] < losses(first)[0]
    assert made.tokens_seen > 0
    assert sorted(path.name for path in (tmp_path / "sft" / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]

    pair_file = write_rows(tmp_path / "pairs.jsonl", pairs)
    scorer = trl_recipe("reward", tmp_path, pair_file, first.output_dir)
    made = reward.run(scorer)
    assert made.kind == "reward_adapter"
    assert made.extra["normaliser"]["count"] > 0
    section = scorer.model.model_copy(update={"name_or_path": scorer.output_dir})
    assert load_reward_model(section, make_tokenizer())

    policy = trl_recipe("dpo", tmp_path, pair_file, first.output_dir)
    assert dpo.run(policy).extra["reference"] == "adapter"
    assert losses(policy)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(policy)[-1] < 0.6

    feedback = trl_recipe("kto", tmp_path, write_rows(tmp_path / "kto.jsonl", marked), first.output_dir)
    assert kto.run(feedback).kind == "adapter"
    assert losses(feedback)[-1] < losses(feedback)[0]


def test_a_killed_run_on_trl_goes_on_the_same(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = write_rows(
        tmp_path / "sft.jsonl", [{"prompt": f"{a} {b}?", "completion": f"{b}."} for a in _WORDS for b in _WORDS]
    )
    whole = trl_recipe("sft", tmp_path / "whole", rows, tiny_model_folder)
    expected = sft.run(whole)
    killed = trl_recipe("sft", tmp_path / "killed", rows, tiny_model_folder)
    sft.run(killed)
    (tmp_path / "killed" / "sft" / "artifact.json").unlink()  # as after a kill between steps 4 and 6
    (tmp_path / "killed" / "sft" / "checkpoints" / "checkpoint-6" / "manifest.json").unlink()
    resumed = sft.run(killed)
    weights = "model/adapter_model.safetensors"
    assert resumed.files[weights] == expected.files[weights]
    assert resumed.tokens_seen == expected.tokens_seen
