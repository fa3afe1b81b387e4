"""Whose models, checkpoints and disk: planted for real in folders on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatalign.artifact import Artifact, BaseModelRef
from chatalign.check import place as check_place
from chatalign.check import sizes
from chatalign.checkpoint import write_manifest
from chatalign.models.resolve import base_sha256, write_base_ref
from chatalign.recipe import LoraSection, load_recipe
from chatalign.runs import Run, open_run
from check.conftest import Check, only, question, write_recipe, write_rows

DPO = {"stage": "dpo", "data": {"datasets": [{"path": "pairs.jsonl"}], "max_length": 64}}


def write_adapter(folder: Path, base: str) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora_A": torch.zeros(4, 32), "lora_B": torch.zeros(32, 4)}, folder / "adapter_model.safetensors")
    write_base_ref(folder, BaseModelRef(name_or_path=base, sha256=base_sha256(base)))
    shutil.copy("model/tokenizer.json", folder)
    shutil.copy("model/tokenizer_config.json", folder)


def test_an_adapter_on_another_base_fails(place: Path, check: Check) -> None:
    write_adapter(place / "adapter", "model")
    assert only(check("model.name_or_path=adapter")["identity"], "ok").endswith("the one that it was trained on")
    weights = load_file("model/model.safetensors")
    name = sorted(weights)[0]
    weights[name][0, 0] += 1
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    said = only(check("model.name_or_path=adapter")["identity"], "FAIL")
    assert said.startswith("adapter: trained on a base with sha256 ")
    assert said.endswith("give it its own base back")
    (place / "adapter" / "base_model.json").unlink()
    assert "records no hash of its base" in only(check("model.name_or_path=adapter")["identity"], "note")


def test_the_reference_is_named(place: Path, check: Check) -> None:
    write_adapter(place / "adapter", "model")
    write_recipe(place / "dpo.yaml", **DPO)

    def reference(*overrides: str) -> str:
        return only(check(*overrides, recipe="dpo.yaml")["reference"], "ok")

    assert reference() == "reference: a frozen copy of the policy model"
    assert reference("lora.r=4") == "reference: model, the policy's own base, without the new adapter"
    continued = reference("model.name_or_path=adapter")
    assert continued == "reference: the adapter adapter as it is now, on the policy's own base model"
    assert "reference" not in check()


def test_a_reward_model_is_no_policy(place: Path, check: Check) -> None:
    config = json.loads(Path("model/config.json").read_text("utf-8"))
    Path("model/config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    assert "a reward model, not a language model" in only(check()["identity"], "FAIL")


@pytest.fixture
def begun(place: Path) -> Run:
    """A run of the recipe that was killed, with two whole checkpoints."""
    run = open_run(load_recipe("sft.yaml"))
    for step in (5, 10):
        save_checkpoint(run, step, run.run_id)
    return run


def save_checkpoint(run: Run, step: int, run_id: str) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainable.safetensors").write_bytes(b"weights")
    write_manifest(folder, run_id)
    return folder


def test_a_killed_run_goes_on(begun: Run, check: Check) -> None:
    assert only(check()["checkpoints"], "ok") == "the run in runs/x goes on from checkpoint-10"


def test_another_runs_checkpoint_fails(begun: Run, check: Check) -> None:
    save_checkpoint(begun, 15, "f00d")
    said = only(check()["checkpoints"], "FAIL")
    assert f"belongs to run f00d, not to this one ({begun.run_id}); take it out of the folder" in said


@pytest.mark.parametrize("damage", ["unsealed", "altered"])
def test_a_damaged_checkpoint_is_a_note_with_the_one_before_it(begun: Run, check: Check, damage: str) -> None:
    newest = begun.checkpoints / "checkpoint-10"
    if damage == "unsealed":
        (newest / "manifest.json").unlink()
    else:
        (newest / "trainable.safetensors").write_bytes(b"wEights")
    said = only(check()["checkpoints"], "note")
    assert "checkpoint-10" in said
    assert "the run goes on from checkpoint-5, the newest whole one" in said


def test_a_changed_recipe_fails_where_checkpoints_would_be_lost(begun: Run, place: Path, check: Check) -> None:
    said = only(check("train.learning_rate=7")["checkpoints"], "FAIL")
    assert "train.learning_rate: null → 7.0, since its unfinished run (checkpoint-10) was begun" in said
    assert "`--allow-change train.learning_rate` goes on with it" in said
    write_rows(place / "rows.jsonl", [question(i) for i in range(21)])
    assert "data.datasets.0.contents (rows.jsonl): sha256 " in only(check()["checkpoints"], "FAIL")


def test_a_changed_recipe_says_what_changed_and_what_goes(begun: Run, place: Path, check: Check) -> None:
    shutil.rmtree(begun.checkpoints / "checkpoint-5")
    (begun.checkpoints / "checkpoint-10" / "manifest.json").unlink()  # nothing whole is lost
    said = only(check("train.seed=7")["checkpoints"], "note")
    assert "holds the run of another recipe (train.seed: 42 → 7)" in said
    assert "it and its 1 checkpoints will be moved to runs/x.previous" in said
    write_rows(place / "rows.jsonl", [question(i) for i in range(21)])
    assert "its data, models or chatalign have changed since" in only(check()["checkpoints"], "note")


def test_a_finished_run_is_a_note(begun: Run, check: Check) -> None:
    artifact = Artifact(stage="sft", kind="model", run_id=begun.run_id, fingerprint=begun.fingerprint)
    artifact.save(begun.folder)
    assert "is finished and unchanged; nothing will run" in only(check()["checkpoints"], "note")


def test_a_full_disk_fails_with_the_sizes(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(".")
    monkeypatch.setattr(check_place.shutil, "disk_usage", lambda _: free._replace(free=200_000))
    said = only(check()["disk"], "FAIL")
    assert said.startswith("runs/x: 0.2 MB are free, and by this stage about ")
    assert "MB are written there" in said
    assert "lower `train.save_total_limit`" in said
    monkeypatch.setattr(check_place.shutil, "disk_usage", lambda _: free._replace(free=10_000_000))
    assert "(3 checkpoints of " in only(check()["disk"], "ok")


def test_a_pipelines_stages_share_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("sft.yaml")
    needed = sizes.estimate(recipe, {})
    assert needed is not None
    free = shutil.disk_usage(".")
    room = int(needed.output + needed.afterwards / 2) + needed.tokens
    monkeypatch.setattr(check_place.shutil, "disk_usage", lambda _: free._replace(free=room))
    used = check_place.DiskUse()
    problems = [check_place.disk_finding(recipe, {}, used).problem for _ in range(2)]  # type: ignore[union-attr]
    assert problems[0] is None
    assert "are free, and by this stage about" in str(problems[1])


@pytest.mark.parametrize("lora", [None, {"r": 4}, {"r": 8, "target_modules": ["q_proj", "down_proj"]}])
def test_the_estimate_is_what_is_written(place: Path, tmp_path: Path, lora: dict[str, Any] | None) -> None:
    """Against peft's own count of trainable weights, and torch's own files of weights and AdamW's states."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained("model")
    if lora is not None:
        settings = LoraSection.model_validate(lora)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings.model_dump()))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_file({name: p.detach() for name, p in trained.items()}, tmp_path / "weights.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    written = sum(os.path.getsize(tmp_path / name) for name in ("weights.safetensors", "optimizer.pt"))

    recipe = load_recipe("sft.yaml", {} if lora is None else {"lora": lora})
    assert sizes.trained_weights(recipe, {}) == sum(p.numel() for p in trained.values())
    estimated = sizes.estimate(recipe, {})
    assert estimated is not None
    assert estimated.checkpoint < written < 1.35 * estimated.checkpoint + 40_000  # headers, and names of small tensors
    assert estimated.kept == 2
    assert estimated.output == 3 * estimated.checkpoint + estimated.model


def test_the_token_cache_is_where_datasets_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert check_place.datasets_cache() == tmp_path / "datasets"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "tokens"))
    assert check_place.datasets_cache() == tmp_path / "tokens"
