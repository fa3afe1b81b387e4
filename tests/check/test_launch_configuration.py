"""Launches that would not do what they say: by accelerate's file before them, by the launcher's environment in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from typer.testing import CliRunner

from chatalign.check.launch import (
    Launch,
    default_config,
    gpus_here,
    launch_of_config,
    launch_of_environment,
    launch_problems,
)
from chatalign.commands import app
from chatalign.errors import GuardError
from chatalign.recipe import load_recipe
from check.conftest import Check, only, write_recipe

ROOT = Path(__file__).resolve().parents[2]
CPU = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "num_machines": 1}
DEEPSPEED = {"distributed_type": "DEEPSPEED", "num_processes": 2, "mixed_precision": "no"}


def environment_of(*arguments: str) -> dict[str, str]:
    """What accelerate's own launcher leaves in the environment of the one process that it starts."""
    parsed = launch_command_parser().parse_args([*arguments, "script.py"])
    return prepare_simple_launcher_cmd_env(_validate_launch_command(parsed)[0])[1]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher", "place")
def test_accelerate_starts_one_unconnected_process_on_cpus_and_it_is_named() -> None:
    recipe = load_recipe("sft.yaml")
    one = launch_of_environment(environment_of("--cpu", "--num_processes", "1"))
    assert list(launch_problems(recipe, one, gpus=None)) == []
    two = launch_of_environment(environment_of("--cpu", "--num_processes", "2"))
    (problem,) = launch_problems(recipe, two, gpus=None)
    assert isinstance(problem, GuardError)
    assert "asks for several processes on the CPU, and accelerate starts one alone, unconnected" in str(problem)
    assert "torchrun --nproc_per_node N -m chatalign.sft RECIPE" in str(problem)


@pytest.mark.usefixtures("no_launcher", "place")
def test_such_a_launch_is_refused_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of("--cpu", "--num_processes", "2").items():
        monkeypatch.setenv(name, value)
    outcome = CliRunner().invoke(app, ["sft", "sft.yaml"])
    assert outcome.exit_code == 2, outcome.output
    assert "unconnected; launch with" in outcome.output
    assert not Path("runs").exists()


def test_torchrun_is_as_it_says() -> None:
    launch = launch_of_environment({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"})
    assert launch == Launch(where="the launcher", processes=2, per_machine=2)
    assert launch_of_environment({}) == Launch(where="the launcher")


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        (CPU | {"num_processes": 2}, [], "asks for 2 processes on the CPU, and accelerate starts one alone"),
        (
            {"distributed_type": "MULTI_GPU", "num_processes": 8},
            [],
            "asks for 8 processes on this machine, which has 4",
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 2, "mixed_precision": "bf16"},
            ["train.bf16=false"],
            "`mixed_precision: bf16` contradicts `train.bf16: false`; set `mixed_precision: no` there",
        ),
        (
            {"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": "bf16"},
            ["train.fp16=true"],
            "`mixed_precision: bf16` contradicts `train.fp16: true`",
        ),
        (
            DEEPSPEED | {"deepspeed_config": {"gradient_accumulation_steps": 4}},
            [],
            "`gradient_accumulation_steps: 4` contradicts `train.gradient_accumulation_steps: 1`",
        ),
        (
            DEEPSPEED | {"deepspeed_config": {"deepspeed_config_file": "ds.json"}},
            ["train.gradient_accumulation_steps=2"],
            "`gradient_accumulation_steps: 1` contradicts `train.gradient_accumulation_steps: 2`",
        ),
        (
            DEEPSPEED | {"deepspeed_config": {"gradient_clipping": 0.5}},
            [],
            "`gradient_clipping: 0.5` contradicts `train.max_grad_norm: 1`",
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 2},
            ["quantization.load_in_4bit=true", "lora.r=4"],
            "FSDP can't shard `quantization`'s weights; launch with accelerate_configs/ddp.yaml",
        ),
    ],
)
def test_what_a_configuration_contradicts_fails(
    place: Path, check: Check, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], overrides: list[str], words: str
) -> None:
    monkeypatch.setattr("chatalign.check.launch.gpus_here", lambda: 4)
    (place / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    (place / "accelerate.yaml").write_text(yaml.safe_dump(config))
    said = only(check(*overrides, accelerate_config="accelerate.yaml")["launch"], "FAIL")
    assert said.startswith("accelerate.yaml: ")
    assert words in said


def test_ppo_batches_are_shared_out(place: Path) -> None:
    changes = {"stage": "ppo", "reward_model": {"name_or_path": "model"}, "ppo": {"rollout_batch_size": 12}}
    write_recipe(place / "ppo.yaml", **changes)
    problems = [
        list(launch_problems(load_recipe("ppo.yaml"), Launch(where="it", processes=count), gpus=None))
        for count in (4, 8)
    ]
    assert problems[0] == []
    assert "can't be shared out over 8 processes" in str(problems[1][0])


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.usefixtures("place")
def test_the_shipped_configurations_are_right(path: Path) -> None:
    assert list(launch_problems(load_recipe("sft.yaml"), launch_of_config(path), gpus=8)) == []


def test_a_file_that_is_not_there_is_a_finding(check: Check) -> None:
    assert "nowhere.yaml: no such file" in only(check(accelerate_config="nowhere.yaml")["recipe"], "FAIL")


@pytest.mark.parametrize("text", ["- a list", "a: [", None])
def test_a_file_that_cannot_be_read_is_a_finding(place: Path, check: Check, text: str | None) -> None:
    config = DEEPSPEED | {"deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    (place / "ds.json").write_text("[]")
    (place / "accelerate.yaml").write_text(yaml.safe_dump(config) if text is None else text)
    said = only(check(accelerate_config="accelerate.yaml")["recipe"], "FAIL")
    assert said.startswith("ds.json: can't be read" if text is None else "accelerate.yaml: ")


def test_accelerates_default_file_is_found(place: Path, check: Check) -> None:
    assert "launch" not in check()
    (place / "home" / "accelerate").mkdir(parents=True)
    (place / "home" / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(CPU | {"num_processes": 4}))
    assert default_config() == place / "home" / "accelerate" / "default_config.yaml"
    assert "asks for 4 processes" in only(check()["launch"], "FAIL")


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatalign.check.launch._NVIDIA", tmp_path / "none")
    assert gpus_here({}) is None
    for name in ("0000:01", "0000:02"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr("chatalign.check.launch._NVIDIA", tmp_path / "gpus")
    assert gpus_here({}) == 2
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert gpus_here({"CUDA_VISIBLE_DEVICES": ""}) == 0
