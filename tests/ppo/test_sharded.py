"""FSDP2: two processes with half of the weights each end as one process does, and go on from their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import run_ranks
from peft import PeftModel
from tiny import make_llama
from transformers import AutoModelForCausalLM

from chatalign import ppo
from chatalign.engine.ppo_shards import refuse_unshardable
from chatalign.errors import ModelError
from chatalign.recipe import PpoRecipe

from . import sharded_run
from .conftest import LORA, Make
from .test_resume import go_on_from
from .test_run import logged, weights

POLICIES = (("lora", LORA), ("full", None))
# What `accelerate launch --config_file accelerate_configs/fsdp2.yaml` sets, on CPUs.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def launch_sharded(folder: Path, *recipes: PpoRecipe, **environment: str) -> None:
    run_ranks(2, sharded_run.train, recipes, printed=folder / "printed.txt", environment=FSDP2 | environment)


def assert_same_run(one: PpoRecipe, two: PpoRecipe) -> None:
    ours, theirs = weights(one), weights(two)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    for mine, yours in zip(logged(one), logged(two), strict=True):
        assert yours["step"] == mine["step"]
        for key in mine.keys() - {"time_s", "tokens_per_s"}:
            if not key.startswith("speed/"):
                assert yours[key] == pytest.approx(mine[key], abs=1e-4), key
    assert evaluated(two) == pytest.approx(evaluated(one), abs=1e-4)


def evaluated(recipe: PpoRecipe) -> list[float]:
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [line["eval_objective/score"] for line in map(json.loads, lines) if "eval_objective/score" in line]


@pytest.mark.slow
def test_shards_train_as_whole_weights_do(
    make_recipe: Make,
    tmp_path: Path,
    tiny_model_folder: Path,
    tiny_tokenizer: Any,
    sft_run: Path,
    reward_adapter_run: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "1 + 2", "completion": "3"}) + "\n" for _ in range(5)), "utf-8")
    make_llama(len(tiny_tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    cases: dict[str, dict[str, Any]] = {
        # Policy, reference, value and reward as adapters of one base. Of three evaluation prompts one process draws
        # two, one after the other: no collective may run meanwhile.
        "adapters": {
            "model": {"name_or_path": str(sft_run)},
            "reward_model": {"name_or_path": str(reward_adapter_run)},
            "data": {"eval_fraction": 0.4},
            "ppo": {"rewards": [], "normalize_reward": "replies", "local_rollout_forward_batch_size": 1},
            "train": {**saves, "eval_strategy": "steps", "eval_steps": 4, "gradient_checkpointing": True},
        },
        # A policy and a value function with all weights, tied embeddings, two passes of a layer in one update.
        "whole": {
            "model": {"name_or_path": str(tmp_path / "tied")},
            "ppo": {"ptx_coef": 0.5, "entropy_coef": 0.01, "value_warmup_rollouts": 1},
            "ptx_data": {"datasets": [{"path": str(rows)}]},
            "train": saves,
        },
        "shared": {"ppo": {"value": "shared"}, "lora": LORA, "train": saves},
    }
    twos = {name: make_recipe(f"{name}-two", over) for name, over in cases.items()}
    launch_sharded(tmp_path, *twos.values())
    for name, over in cases.items():
        one = make_recipe(f"{name}-one", over)
        ppo.run(one)
        assert_same_run(one, twos[name])
    # In the middle of a rollout, and between two.
    resumed = [(name, make_recipe(f"{name}-{step}", cases[name])) for name, step in (("adapters", 3), ("whole", 4))]
    for name, recipe in resumed:
        go_on_from(Path(twos[name].output_dir), int(recipe.output_dir[-1]), Path(recipe.output_dir))
    launch_sharded(tmp_path, *(recipe for _, recipe in resumed))
    for name, recipe in resumed:
        theirs = weights(recipe)
        for key, tensor in weights(twos[name]).items():
            assert torch.equal(theirs[key], tensor), key
    ids = torch.arange(8)[None]
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder), Path(twos["shared"].output_dir) / "model"
    )
    assert policy(ids).logits.isfinite().all()
    whole = AutoModelForCausalLM.from_pretrained(Path(twos["whole"].output_dir) / "model")
    assert whole.lm_head.weight is whole.get_input_embeddings().weight


@pytest.mark.slow
def test_bf16_rounds_as_it_does_without_shards(make_recipe: Make, tmp_path: Path) -> None:
    runs = {
        shards: [make_recipe(f"{name}-{shards}", {"lora": lora, "train": {"bf16": True}}) for name, lora in POLICIES]
        for shards in ("true", "false")
    }
    for shards, recipes in runs.items():
        launch_sharded(tmp_path, *recipes, ACCELERATE_USE_FSDP=shards)
    for sharded, whole in zip(runs["true"], runs["false"], strict=True):
        assert_same_run(whole, sharded)
        assert logged(sharded)[0]["policy/ratio_mean"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("plugins", "over", "message"),
    [
        ({"deepspeed_plugin": {"zero_stage": 3}}, {}, "PPO does not train under ZeRO-3"),
        ({"fsdp_plugin": {"fsdp_version": 1}}, {}, "set `fsdp_version: 2`"),
        ({"fsdp_plugin": {"cpu_ram_efficient_loading": True}}, {}, "`fsdp_cpu_ram_efficient_loading: false`"),
        ({"fsdp_plugin": {"activation_checkpointing": True}}, {}, "`fsdp_activation_checkpointing: false`"),
        ({"fsdp_plugin": {}}, {"quantization": {"load_in_4bit": True}}, "can't shard `quantization`'s weights"),
        ({"fsdp_plugin": {}}, {"ppo": {"rollout_engine": "vllm_colocate"}}, "set `ppo.rollout_engine: transformers`"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(
    make_recipe: Make, plugins: dict[str, Any], over: dict[str, Any], message: str
) -> None:
    usual = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False}
    state = SimpleNamespace(**{name: SimpleNamespace(**usual | values) for name, values in plugins.items()})
    args = SimpleNamespace(fp16=False, bf16=False)
    with pytest.raises(ModelError, match=message) as refused:
        refuse_unshardable(make_recipe("run", {"lora": LORA, **over}), torch.nn.Linear(2, 2), args, state)
    assert "\n" not in str(refused.value)


def test_weights_of_two_precisions_need_autocast(make_recipe: Make) -> None:
    two = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False, activation_checkpointing=False)
    state = SimpleNamespace(fsdp_plugin=plugin)
    refuse_unshardable(make_recipe(), two, SimpleNamespace(fp16=False, bf16=True), state)
    with pytest.raises(ModelError, match="these are in bfloat16 and float32"):
        refuse_unshardable(make_recipe(), two, SimpleNamespace(fp16=False, bf16=False), state)
    with pytest.raises(ModelError, match=r"`train\.fp16: false`"):
        refuse_unshardable(make_recipe(), two, SimpleNamespace(fp16=True, bf16=False), state)
    refuse_unshardable(make_recipe(), two, SimpleNamespace(fp16=False, bf16=False), SimpleNamespace())
