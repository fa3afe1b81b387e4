"""Each stage end to end on a tiny model and real rows: it learns, hands on, goes on where it was, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_llama
from transformers import AutoModelForCausalLM

from chatalign import dpo, pretrain, reward, sft
from chatalign.artifact import load_artifact, sha256_weights, verify_files
from chatalign.engine.dpo_trainer import DpoTrainer
from chatalign.errors import ArtifactError, GuardError, ModelError
from chatalign.models.adapters import load_policy
from chatalign.models.heads import load_reward_model
from chatalign.models.tokenizer import load_tokenizer
from chatalign.recipe import DpoRecipe, PretrainRecipe, Recipe, RewardRecipe, SftRecipe
from chatalign.recipe.stages import STAGES
from chatalign.runs import finished

_WORDS = ["hello", "world", "thank you", "the answer", "Paris", "capital", "France"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of texts, demonstrations and pairs that a tiny model can learn."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "text.jsonl", [{"text": f"{a} {b}"} for a in _WORDS for b in _WORDS])
    chats = [
        {"messages": [{"role": "user", "content": f"{a} {b}?"}, {"role": "assistant", "content": f"{b}."}]}
        for a in _WORDS
        for b in _WORDS
    ]
    write_rows(folder / "sft.jsonl", chats)
    pairs = [{"prompt": f"{a} {b}?", "chosen": f"{b}.", "rejected": f"{a} {a} no"} for a in _WORDS for b in _WORDS]
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


def make_recipe(stage: str, folder: Path, data: Path, model: Path | str, **changes: Any) -> Any:
    file = {"pretrain": "text", "sft": "sft", "reward": "pairs", "dpo": "pairs"}[stage]
    raw: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(folder / stage),
        "model": {"name_or_path": str(model)},
        "data": {"datasets": [{"path": str(data / f"{file}.jsonl")}], "max_length": 64, "eval_fraction": 0.2},
        "train": {"learning_rate": 2e-2, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            raw.setdefault(section, {})[key] = value
        else:
            raw[section] = value
    return STAGES[stage].model_validate(raw)


def means(recipe: Recipe, name: str) -> list[float]:
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


LORA = {"r": 4, "lora_alpha": 8}


def test_sft_learns_and_leaves_a_whole_run(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(
        "sft", tmp_path, data, tiny_model_folder, train__eval_strategy="epoch", train__num_train_epochs=3
    )
    artifact = sft.run(recipe)
    losses = means(recipe, "loss")
    assert losses[-1] < 0.7 * losses[0]
    assert means(recipe, "eval_loss")[-1] < means(recipe, "eval_loss")[0]
    assert artifact == load_artifact(recipe.output_dir) == finished(recipe)
    assert not verify_files(recipe.output_dir, artifact.files)
    assert (artifact.kind, artifact.stage, artifact.base_model.name_or_path) == ("model", "sft", str(tiny_model_folder))
    assert artifact.metrics["loss"] == losses[-1]
    assert artifact.metrics["eval_loss"] == means(recipe, "eval_loss")[-1]
    assert artifact.tokens_seen > 0
    assert artifact.tokens_per_s > 0
    assert artifact.tokenizer_sha256
    model = AutoModelForCausalLM.from_pretrained(Path(recipe.output_dir) / "model")
    assert model.config.use_cache
    assert model.config._attn_implementation != "chatalign_segments"


def test_adapters_go_from_sft_to_reward_and_dpo(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    first = make_recipe("sft", tmp_path, data, tiny_model_folder, lora=LORA)
    assert sft.run(first).kind == "adapter"

    scorer = make_recipe(
        "reward", tmp_path, data, first.output_dir, train__num_train_epochs=3, train__eval_strategy="epoch"
    )
    made = reward.run(scorer)
    assert made.kind == "reward_adapter"
    assert made.parents[0].path == first.output_dir
    assert means(scorer, "eval_accuracy")[-1] >= 0.8
    assert means(scorer, "score_std")[-1] > 0
    assert made.extra["normaliser"]["count"] > 0
    tokenizer = load_tokenizer(scorer.model)
    assert load_reward_model(scorer.model.model_copy(update={"name_or_path": scorer.output_dir}), tokenizer)

    policy = make_recipe("dpo", tmp_path, data, first.output_dir, train__num_train_epochs=2)
    chosen = dpo.run(policy)
    assert chosen.kind == "adapter"
    assert chosen.extra["reference"] == "adapter"
    assert means(policy, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    assert means(policy, "logratio_per_token")[0] == pytest.approx(0, abs=1e-4)
    assert means(policy, "rewards/accuracies")[-1] > 0.9
    assert means(policy, "rewards/margins")[-1] > 0.1


def test_reward_model_stores_its_scale_in_its_configuration(
    tmp_path: Path, data: Path, tiny_model_folder: Path
) -> None:
    recipe = make_recipe("reward", tmp_path, data, tiny_model_folder, reward__center_rewards_coefficient=0.01)
    artifact = reward.run(recipe)
    config = json.loads((Path(recipe.output_dir) / "model" / "config.json").read_text())
    assert artifact.kind == "reward_model"
    assert config["score_mean"] == pytest.approx(artifact.extra["normaliser"]["mean"])


@pytest.mark.parametrize(("loss_type", "at_zero"), [("hinge", 1.0), ("ipo", 25.0), ("sigmoid_norm", 0.6931)])
def test_dpo_losses_start_at_their_closed_form(
    tmp_path: Path, data: Path, tiny_model_folder: Path, loss_type: str, at_zero: float
) -> None:
    recipe = make_recipe(
        "dpo",
        tmp_path,
        data,
        tiny_model_folder,
        dpo__loss_type=loss_type,
        train__max_steps=2,
        train__learning_rate=1e-4,
    )
    assert dpo.run(recipe).extra["reference"] == "copy"
    assert means(recipe, "loss")[0] == pytest.approx(at_zero, rel=1e-3)


def test_precomputed_reference_is_the_same_training(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    runs = {}
    for name, precompute in (("a", False), ("b", True)):
        recipe = make_recipe(
            "dpo",
            tmp_path / name,
            data,
            tiny_model_folder,
            dpo__precompute_ref_log_probs=precompute,
            dpo__sft_weight=0.5,
            train__max_steps=6,
            train__learning_rate=1e-4,
            train__gradient_accumulation_steps=2,
        )
        dpo.run(recipe)
        runs[name] = [means(recipe, metric) for metric in ("loss", "rewards/margins", "logps/chosen")]
    for with_reference, precomputed in zip(runs["a"], runs["b"], strict=True):
        assert precomputed == pytest.approx(with_reference, abs=1e-4)


def test_dpo_refuses_a_reference_that_is_not_its_start(
    tmp_path: Path, data: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("dpo", tmp_path, data, tiny_model_folder)

    def with_another_reference(recipe: DpoRecipe, tokenizer: Any) -> Any:
        policy = load_policy(recipe, tokenizer)
        policy.reference.module.load_state_dict(make_llama(len(tokenizer), seed=5).state_dict())
        return policy

    monkeypatch.setattr(dpo, "load_policy", with_another_reference)
    with pytest.raises(GuardError, match="the reference is not the model that this run starts from"):
        dpo.run(recipe)


def test_dpo_refuses_a_reference_that_moved(
    tmp_path: Path, data: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("dpo", tmp_path, data, tiny_model_folder, train__max_steps=1)
    objective = DpoTrainer.objective

    def moves_it(self: DpoTrainer, *arguments: Any) -> Any:
        with torch.no_grad():
            next(self.reference.module.parameters()).add_(1e-6)
        return objective(self, *arguments)

    monkeypatch.setattr(DpoTrainer, "objective", moves_it)
    with pytest.raises(GuardError, match="its weights changed during training"):
        dpo.run(recipe)


def pretrain_recipe(folder: Path, data: Path, tokenizer: Path, **changes: Any) -> PretrainRecipe:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 128}
    recipe = make_recipe("pretrain", folder, data, "", **changes)
    model = {"config": config, "tokenizer_name_or_path": str(tokenizer)}
    return PretrainRecipe.model_validate(recipe.model_dump() | {"model": model})


def test_pretrain_from_nothing_then_taken_as_it_is(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    recipe = pretrain_recipe(tmp_path / "made", data, tiny_model_folder, train__num_train_epochs=3)
    made = pretrain.run(recipe)
    assert made.extra["from_scratch"]
    assert means(recipe, "loss")[-1] < means(recipe, "loss")[0]
    finished_model = str(Path(recipe.output_dir) / "model")

    taking = pretrain_recipe(
        tmp_path / "taken", data, tiny_model_folder, pretrained=finished_model, train__num_train_epochs=3
    )
    taken = pretrain.run(taking)
    assert taken.extra == {"from_scratch": False, "taken_from": finished_model, "made_by_run": made.run_id}
    assert taken.base_model.sha256
    assert taken.files.keys() == made.files.keys()
    assert not verify_files(taking.output_dir, taken.files)

    again = pretrain.run(taking.model_copy(update={"from_scratch": True, "output_dir": str(tmp_path / "again")}))
    assert again.extra["from_scratch"]
    assert again.files["model/model.safetensors"] == made.files["model/model.safetensors"]


def test_a_pretrained_model_that_was_altered_is_refused(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    recipe = pretrain_recipe(tmp_path / "made", data, tiny_model_folder, train__max_steps=1)
    pretrain.run(recipe)
    weights = Path(recipe.output_dir) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    taking = pretrain_recipe(tmp_path / "taken", data, tiny_model_folder, pretrained=str(weights.parent))
    with pytest.raises(ModelError, match="altered since it was written"):
        pretrain.run(taking)


def test_a_shipped_model_is_held_to_its_recipes_hash(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    right = sha256_weights(tiny_model_folder)
    taking = {"pretrained": str(tiny_model_folder), "pretrained_sha256": right}
    taken = pretrain.run(pretrain_recipe(tmp_path / "taken", data, tiny_model_folder, **taking))
    assert taken.base_model.sha256 == right
    taking["pretrained_sha256"] = "0" * 64
    with pytest.raises(ModelError, match=f"has weights of sha256 {right}, not `pretrained_sha256`"):
        pretrain.run(pretrain_recipe(tmp_path / "refused", data, tiny_model_folder, **taking))


def test_a_parent_that_is_not_finished_is_refused(tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no finished run"):
        dpo.run(make_recipe("dpo", tmp_path, data, tmp_path / "sft"))


def test_recipes_have_the_types_that_stages_take(tmp_path: Path, data: Path) -> None:
    for stage, recipe_class in (("sft", SftRecipe), ("reward", RewardRecipe), ("dpo", DpoRecipe)):
        assert isinstance(make_recipe(stage, tmp_path, data, "x"), recipe_class)
