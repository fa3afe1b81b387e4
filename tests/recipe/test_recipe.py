"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from chatalign.errors import RecipeError
from chatalign.recipe import (
    DpoSection,
    LoraSection,
    QuantizationSection,
    SftRecipe,
    TrainSection,
    apply_overrides,
    load_pipeline,
    load_recipe,
    parse_overrides,
    read_yaml,
    validate_stage,
)

SFT: dict[str, Any] = {
    "stage": "sft",
    "output_dir": "runs/x",
    "model": {"name_or_path": "m"},
    "data": {"datasets": [{"path": "rows.jsonl"}]},
}


def write(folder: Path, raw: Any, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False), "utf-8")
    return path


def test_reads_and_freezes(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SFT), {"train.learning_rate": 1e-4})
    assert isinstance(recipe, SftRecipe)
    assert recipe.train.learning_rate == 1e-4
    with pytest.raises(ValueError, match="frozen"):
        recipe.output_dir = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"train": {"learning_rat": 1}},
            "`train.learning_rat` is not a recipe key; did you mean `train.learning_rate`",
        ),
        ({"lora": {"rnak": 4}}, "`lora.rnak` is not a recipe key; did you mean `lora.r`?"),
        ({"learning_rate": 1}, "did you mean `train.learning_rate`?"),
        ({"data": {"datasets": []}}, "`data.datasets`: List should have at least 1 item"),
        ({"train": {"learning_rate": "fast"}}, "`train.learning_rate`: Input should be a valid number"),
        ({"train": {"bf16": True, "fp16": True}}, "`bf16` and `fp16` contradict each other"),
        ({"model": {"name_or_path": "m", "config": {"model_type": "llama"}}}, "contradict each other"),
        ({"quantization": {"load_in_4bit": True}}, "add a `lora` section to train (QLoRA)"),
        ({"stage": "dpo", "lora": {"lora_dropout": 0.1}}, "`lora.lora_dropout` must be 0 in dpo"),
        ({"stage": "reward", "lora": {"lora_dropout": 0.1}}, "`lora.lora_dropout` must be 0 in reward"),
        ({"hub": {"push": True}}, "`push: true` needs `repo`"),
        ({"model": {"name_or_path": "m", "attention": "flash"}}, "`model.attention`: Input should be 'auto', 'varlen'"),
        ({"train": {"gradient_checkpointing": "selective"}}, "`train.gradient_checkpointing"),
        (
            {"train": {"liger_kernel_config": {"fused_linear_cross_entropy": True}}},
            "`train.liger_kernel_config.fused_linear_cross_entropy` would replace the native engine's own loss",
        ),
        ({"engine": "trl", "model": {"name_or_path": "m", "attention": "flex"}}, "`model.attention` is the native"),
        ({"engine": "trl", "train": {"gradient_checkpointing": "auto"}}, "give TRL true or false"),
        (
            {"stage": "ppo", "reward_model": {"name_or_path": "rm"}, "train": {"torch_compile": True}},
            "`train.torch_compile` is not available in ppo",
        ),
        ({"stage": "sfft"}, "`stage: sfft` is not a stage; did you mean `sft`?"),
        ({"output_dir": None}, "`output_dir`"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path, SFT | change)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_wrong_keys_are_named_before_other_problems(tmp_path: Path) -> None:
    path = write(tmp_path, SFT | {"train": {"learning_rate": "x", "warmup": 3}, "seed": 1})
    with pytest.raises(RecipeError, match=r"`train.warmup` is not a recipe key.*\(1 more problem after this one\)"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (SFT | {"data": {"datasets": [{"path": "a"}, {"pth": "b"}]}}, "`data.datasets.1.pth`.*`data.datasets.1.path`"),
        ({"stage": "eval", "models": {"a": {"dtpye": "auto"}}}, "`models.a.dtpye` .*did you mean `models.a.dtype`"),
        (SFT | {"stage": "ppo", "ppo": {"rewards": [{"modl": "x"}]}}, "`ppo.rewards.0.modl`.*`ppo.rewards.0.model`"),
        (SFT | {"lora": {"zzz": 1}, "stage": "dpo"}, "`lora.zzz` .*keys here are: alpha_pattern, bias"),
        (SFT | {7: 1}, "`7` is not a recipe key"),
    ],
)
def test_wrong_keys_are_found_in_lists_and_mappings(tmp_path: Path, raw: dict[Any, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path, raw))


def test_free_mappings_take_any_key(tmp_path: Path) -> None:
    free = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {}}
    recipe = load_recipe(
        write(
            tmp_path,
            SFT | {"model": {"config": {"model_type": "llama", "x": 1}, "tokenizer_name_or_path": "t"}, "lora": free},
        )
    )
    assert isinstance(recipe, SftRecipe)
    assert recipe.model.config == {"model_type": "llama", "x": 1}


def test_numbers_like_1e_4_are_numbers(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "a: 1e-4\nb: 2E5\nc: 1e-4x\n")) == {"a": 1e-4, "b": 2e5, "c": "1e-4x"}


def test_no_is_a_word_and_false_is_not(tmp_path: Path) -> None:
    read = read_yaml(write(tmp_path, "eval_strategy: no\nbf16: true\nfp16: False\n"))
    assert read == {"eval_strategy": "no", "bf16": True, "fp16": False}


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2: .*`a` is given twice"):
        read_yaml(write(tmp_path, "a: 1\na: 2\n"))


def test_python_tags_are_not_executed(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_yaml(write(tmp_path, "a: !!python/object/apply:os.system ['true']\n"))


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, SFT, "sft.yaml")
    with pytest.raises(RecipeError, match=r"did you mean .*sft\.yaml"):
        load_recipe(tmp_path / "stf.yaml")


def test_extends_merges_key_by_key_and_refuses_circles(tmp_path: Path) -> None:
    write(tmp_path, SFT | {"train": {"learning_rate": 1e-3, "seed": 7}}, "base.yaml")
    child = write(tmp_path, "extends: base.yaml\ntrain: {learning_rate: 2e-3}\n", "child.yaml")
    recipe = load_recipe(child)
    assert isinstance(recipe, SftRecipe)
    assert (recipe.train.learning_rate, recipe.train.seed) == (2e-3, 7)
    write(tmp_path, "extends: b.yaml", "a.yaml")
    write(tmp_path, "extends: a.yaml", "b.yaml")
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(tmp_path / "a.yaml")


def test_overrides_are_yaml_and_reach_into_lists() -> None:
    overrides = parse_overrides(["train.bf16=true", "data.datasets.0.path=b.jsonl", "lora.r=8", "run_name=null"])
    changed = apply_overrides(SFT, overrides)
    assert changed["train"]["bf16"] is True
    assert changed["data"]["datasets"][0]["path"] == "b.jsonl"
    assert changed["lora"] == {"r": 8}
    assert changed["run_name"] is None
    assert SFT["data"]["datasets"][0]["path"] == "rows.jsonl"  # the original stays as it was
    with pytest.raises(RecipeError, match="not key=value"):
        parse_overrides(["train.bf16"])
    with pytest.raises(RecipeError, match="number below 1"):
        apply_overrides(SFT, {"data.datasets.3.path": "x"})


def test_a_recipe_of_another_stage_says_which_command(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this is a sft recipe; run it with `chatalign sft"):
        load_recipe(write(tmp_path, SFT), stage="dpo")


def test_ppo_needs_a_reward(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="PPO needs a reward"):
        load_recipe(write(tmp_path, SFT | {"stage": "ppo"}))
    whole = SFT | {"stage": "ppo", "reward_model": {"name_or_path": "rm"}, "ppo": {"num_mini_batches": 5}}
    with pytest.raises(RecipeError, match="multiple of `num_mini_batches`"):
        load_recipe(write(tmp_path, whole))


def test_pipeline_chains_only_to_earlier_stages(tmp_path: Path) -> None:
    raw = {
        "pipeline": "p",
        "output_dir": "runs/p",
        "stages": {"sft": {"recipe": "sft.yaml"}, "dpo": {"recipe": "dpo.yaml", "model": "stf"}},
    }
    with pytest.raises(RecipeError, match=r"`stages.dpo.model: stf` is no earlier stage.*did you mean `sft`"):
        load_pipeline(write(tmp_path, raw))
    raw["stages"]["dpo"]["model"] = "sft"  # type: ignore[index]
    pipeline = load_pipeline(write(tmp_path, raw), {"dpo.dpo.beta": 0.3, "output_dir": "runs/q"})
    assert pipeline.stages["dpo"].overrides == {"dpo.beta": 0.3}
    assert pipeline.output_dir == "runs/q"


@pytest.mark.slow
def test_keys_are_the_librarys_own() -> None:
    """Every key of `train`, `lora` and `quantization` is a field of the class that its docs are of."""
    from inspect import signature

    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert (
        set(TrainSection.model_fields) - {"activation_offloading", "fused_layers", "max_hours"} <= fields
    )  # TRL's, below; ours
    assert set(LoraSection.model_fields) <= {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(QuantizationSection.model_fields) <= set(signature(BitsAndBytesConfig).parameters)


@pytest.mark.slow
def test_dpo_and_kto_keys_are_trls_own() -> None:
    from trl import DPOConfig, KTOConfig, RewardConfig

    from chatalign.recipe import DpoSection, KtoSection, RewardSection

    assert "activation_offloading" in {field.name for field in dataclasses.fields(DPOConfig)}
    ours = {"sft_weight", "normalize", "max_length_bias"}  # documented in the sections
    for section, config in [(DpoSection, DPOConfig), (KtoSection, KTOConfig), (RewardSection, RewardConfig)]:
        assert set(section.model_fields) - ours <= {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_type": "sigmiod"}, r"`dpo.loss_type`: .*'sigmoid_norm' \(it is 'sigmiod'\)"),
        ({"label_smoothing": 0.1}, "`label_smoothing` is ignored by `loss_type: sigmoid`"),
        ({"loss_type": "sft", "sft_weight": 0.1}, "give one of the two"),
    ],
)
def test_dpo_settings_that_nobody_reads_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        validate_stage(SFT | {"stage": "dpo", "dpo": changes}, where="test")


def test_dpo_losses_are_those_of_the_maths() -> None:
    from chatalign.maths.preference import dpo_loss
    from chatalign.maths.preference_losses import DPOLossType

    assert set(get_args(DpoSection.model_fields["loss_type"].annotation)) == set(get_args(DPOLossType))
    one = torch.ones(1)
    for name in get_args(DPOLossType):  # the recipe and the maths agree on which of them read label_smoothing
        raw = SFT | {"stage": "dpo", "dpo": {"loss_type": name, "label_smoothing": 0.1}}
        refused = []
        for use in (
            lambda raw=raw: validate_stage(raw, where="test"),
            lambda name=name: dpo_loss(
                chosen_logps_B=one,
                rejected_logps_B=one,
                reference_free=True,
                loss_type=name,
                label_smoothing=0.1,
                chosen_lengths_B=one,
                rejected_lengths_B=one,
            ),
        ):
            try:
                use()
            except ValueError:
                refused.append(name)
        assert len(refused) in (0, 2), name
