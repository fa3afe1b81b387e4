"""Recipes for real models: they load, they fit the published architectures, and accelerate reads its configurations.

Nothing is downloaded: each architecture is built from its published numbers, without weights (meta device).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from accelerate import FullyShardedDataParallelPlugin, init_empty_weights
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, prepare_multi_gpu_env
from transformers import BitsAndBytesConfig

from chatalign.artifact import BaseModelRef
from chatalign.models.adapters import new_adapter
from chatalign.models.load import _quantized
from chatalign.models.tokenizer import TEMPLATES
from chatalign.pipeline import resolve_stages
from chatalign.recipe import RewardRecipe, load_pipeline, load_recipe, read_yaml

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "recipes" / "models"
RECIPES = sorted(MODELS.rglob("*.yaml"))
PIPELINES = [path for path in RECIPES if path.name == "pipeline.yaml"]
STAGES = [path for path in RECIPES if path not in PIPELINES]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

# Published config.json files; the last number is the published count of parameters, embeddings and all.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], float]] = {
    "Qwen/Qwen3-0.6B-Base": (
        "qwen3",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
        0.596e9,
    ),
    "meta-llama/Llama-3.1-8B": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256},
        8.03e9,
    ),
    "EleutherAI/pythia-1b-deduped": (
        "gpt_neox",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 8,
         "vocab_size": 50304},
        1.01e9,
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32000},
        7.24e9,
    ),
}  # fmt: skip


def first_recipe(stage: Path) -> Any:
    """The SFT recipe of the same folder, whose base every later stage stands on."""
    return load_recipe(stage.parent / "sft.yaml")


def empty_model(name: str, *, scoring: bool = False) -> Any:
    model_type, numbers, _ = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(model_type, num_labels=1, **numbers)
    loader: Any = transformers.AutoModelForSequenceClassification if scoring else transformers.AutoModelForCausalLM
    with init_empty_weights():
        model = loader.from_config(config)
    model.tie_weights()
    return model


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.parent.name)
def test_pipelines_chain_the_stages_of_their_folder(path: Path) -> None:
    stages = resolve_stages(load_pipeline(path), path)
    assert {entry.recipe for entry in load_pipeline(path).stages.values()} == {
        other.name for other in path.parent.glob("*.yaml") if other != path
    }
    for name, recipe in stages.items():
        alone = load_recipe(path.parent / f"{name}.yaml")
        assert alone == recipe, "started alone, a stage does what it does in the pipeline"


@pytest.mark.parametrize("path", STAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_numbers_have_a_source(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "umbers: " in text
    assert read_yaml(path)["train"]["learning_rate"] == load_recipe(path).train.learning_rate


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stubs_are_the_published_models(name: str) -> None:
    parameters = sum(p.numel() for p in empty_model(name).parameters())
    assert parameters == pytest.approx(ARCHITECTURES[name][2], rel=0.01)


@pytest.mark.parametrize("path", [p for p in STAGES if p.stem == "sft"], ids=lambda path: path.parent.name)
def test_architecture_takes_what_the_recipe_asks(path: Path) -> None:
    recipe = first_recipe(path)
    name = recipe.model.name_or_path
    assert recipe.model.chat_template_path in (None, *TEMPLATES)
    if recipe.lora is None:
        assert all(p.is_meta for p in empty_model(name).parameters())
        return
    model = new_adapter(empty_model(name), recipe.lora, BaseModelRef(name_or_path=name), task_type="CAUSAL_LM", seed=0)
    adapted = {n.partition(".lora_A.")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    kinds = {n.rpartition(".")[2] for n in adapted}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapted) == 7 * ARCHITECTURES[name][1]["num_hidden_layers"]


@pytest.mark.parametrize("path", [p for p in STAGES if p.stem == "reward"], ids=lambda path: path.parent.name)
def test_reward_stages_have_a_score_head_to_train(path: Path) -> None:
    assert isinstance(load_recipe(path), RewardRecipe)
    model = empty_model(first_recipe(path).model.name_or_path, scoring=True)
    assert model.score.weight.shape == (1, model.config.hidden_size)


def test_qlora_recipe_quantizes_as_the_paper() -> None:
    recipe: Any = load_recipe(MODELS / "llama-3.1-8b-qlora" / "sft.yaml")
    config = _quantized(recipe.quantization, torch.bfloat16)["quantization_config"]
    assert isinstance(config, BitsAndBytesConfig)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def launch_arguments(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``accelerate launch --config_file`` makes of a file, on a machine that has the GPUs it names."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "chatalign.sft", "x.yaml"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = yaml.safe_load(path.read_text("utf-8"))
    config = load_config_from_file(str(path))  # raises on keys that it doesn't know
    assert config.distributed_type == DistributedType(given["distributed_type"])
    arguments = launch_arguments(path, monkeypatch)
    assert arguments.num_processes == given["num_processes"]
    assert arguments.num_machines == given["num_machines"]
    chosen = {"MULTI_GPU": arguments.multi_gpu, "FSDP": arguments.use_fsdp, "DEEPSPEED": arguments.use_deepspeed}
    assert [name for name, on in chosen.items() if on] == [n for n in chosen if n == given["distributed_type"]]
    if arguments.use_deepspeed:
        assert arguments.zero_stage == int(path.stem.removeprefix("zero"))


def test_fsdp_configuration_is_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launch_arguments(ROOT / "accelerate_configs" / "fsdp2.yaml", monkeypatch)
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading
    assert "FULL" in str(plugin.state_dict_type)


def test_every_promised_configuration_is_there() -> None:
    assert {path.stem for path in CONFIGS} == {"cpu", "single_gpu", "ddp", "fsdp2", "zero2", "zero3", "multi_node"}
