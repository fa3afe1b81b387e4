"""Whether a launch does what its configuration says: accelerate's file before it, the launcher's environment in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatalign.check.findings import Finding
from chatalign.errors import ChatalignError, GuardError, RecipeError
from chatalign.recipe import Recipe

_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_NVIDIA = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a launcher was asked for. None stands for what it leaves to the recipe or doesn't say.

    `where` names it in errors. `connected` is false where accelerate starts one process alone, whatever
    `processes` says. `processes` are all, `per_machine` those on this machine.
    """

    where: str
    connected: bool = True
    processes: int = 1
    per_machine: int = 1
    on_gpus: bool = False
    mixed_precision: str | None = None
    gradient_accumulation_steps: int | None = None
    gradient_clipping: float | None = None
    sharding: str | None = None  # where weights are in shards: FSDP or ZeRO-3


def launch_of_config(path: str | Path) -> Launch:
    """What ``accelerate launch --config_file PATH`` is asked for; raises RecipeError where it can't be read."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; give one of accelerate_configs/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: can't be read ({str(error).splitlines()[0]}); mend it") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: holds no mapping; write it with `accelerate config`")
    kind = str(config.get("distributed_type", "NO")).upper()
    deepspeed = {**_deepspeed_file(config), **(config.get("deepspeed_config") or {})}
    processes, machines = (int(_number(config.get(name)) or 1) for name in ("num_processes", "num_machines"))
    alone = kind in ("NO", "MULTI_CPU") and not (config.get("mpirun_config") or config.get("mpirun_hostfile"))
    zero3 = kind == "DEEPSPEED" and deepspeed.get("zero_stage") == 3
    return Launch(
        where=str(path),
        connected=not (alone and processes > 1),
        processes=processes,
        per_machine=-(-processes // machines),
        on_gpus=kind in ("MULTI_GPU", "FSDP", "DEEPSPEED"),
        mixed_precision=str(config.get("mixed_precision") or "no"),
        gradient_accumulation_steps=_number(deepspeed.get("gradient_accumulation_steps")),
        gradient_clipping=_number(deepspeed.get("gradient_clipping")),
        sharding="FSDP" if kind == "FSDP" else "ZeRO-3" if zero3 else None,
    )


def _deepspeed_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed file's settings under accelerate's names; accelerate reads 1 where it has no accumulation."""
    path = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if not path:
        return {}
    try:
        settings = json.loads(Path(path).read_text("utf-8"))
        return {
            "gradient_accumulation_steps": settings.get("gradient_accumulation_steps", 1),
            "gradient_clipping": settings.get("gradient_clipping"),
            "zero_stage": settings.get("zero_optimization", {}).get("stage"),
        }
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path}: can't be read ({error}); mend it, or take `deepspeed_config_file` out") from None


def launch_of_environment(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the launcher of this process was asked for, from the variables that it left."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    # accelerate's simple launcher gives an address where it is asked for several processes, and starts one.
    alone = by_accelerate and {"MASTER_ADDR", "MASTER_PORT"} <= set(environment) and "WORLD_SIZE" not in environment
    fsdp = environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    zero3 = deepspeed and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    on_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return Launch(
        where="the launcher",
        connected=not alone or any(name in environment for name in _MPI),
        processes=processes,
        per_machine=int(environment.get("LOCAL_WORLD_SIZE", "1")),
        on_gpus=processes > 1 and not on_cpu and by_accelerate,
        mixed_precision=environment.get("ACCELERATE_MIXED_PRECISION"),
        gradient_accumulation_steps=_number(environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")),
        gradient_clipping=_number(environment.get("ACCELERATE_GRADIENT_CLIPPING")),
        sharding="FSDP" if fsdp else "ZeRO-3" if zero3 else None,
    )


def launch_findings(recipe: Recipe, launch: Launch) -> Iterator[Finding]:
    """Whether `launch` gives the recipe what both of them say."""
    if recipe.stage == "eval":  # runs in one process, whatever the others have
        return
    what = f"{launch.where}: {launch.processes} process{'es' if launch.processes > 1 else ''}"
    problems = list(launch_problems(recipe, launch, gpus=gpus_here()))
    if not problems:
        yield Finding("launch", f"{what}, as the recipe says")
    for problem in problems:
        yield Finding("launch", what, problem)


def launch_problems(recipe: Recipe, launch: Launch, *, gpus: int | None) -> Iterator[ChatalignError]:
    """What a launch would do otherwise than it says; `gpus` are this machine's at most, None where not known."""
    where, train = launch.where, recipe.train  # type: ignore[union-attr]
    if not launch.connected:
        asked = f"{launch.processes} processes" if launch.processes > 1 else "several processes"
        yield GuardError(
            f"{where}: asks for {asked} on the CPU, and accelerate starts one alone, unconnected; launch with "
            f"`torchrun --nproc_per_node N -m chatalign.{recipe.stage} RECIPE`, or ask for one process "
            f"(num_processes: 1, MASTER_ADDR unset)"
        )
        return
    if launch.on_gpus and gpus is not None and launch.per_machine > gpus and not train.use_cpu:
        yield GuardError(
            f"{where}: asks for {launch.per_machine} processes on this machine, which has {gpus} GPUs; "
            f"set num_processes to that"
        )
    yield from _precision(recipe, launch)
    for name, given, own in (
        ("gradient_accumulation_steps", launch.gradient_accumulation_steps, train.gradient_accumulation_steps),
        ("gradient_clipping", launch.gradient_clipping, train.max_grad_norm),
    ):
        key = "max_grad_norm" if name == "gradient_clipping" else name
        if given is not None and given != own:
            yield GuardError(
                f"{where}: DeepSpeed's `{name}: {given:g}` contradicts `train.{key}: {own:g}`; "
                f"take `{name}` out of the DeepSpeed configuration, the recipe's then holds"
            )
    if launch.sharding and recipe.quantization is not None:
        yield GuardError(
            f"{where}: {launch.sharding} can't shard `quantization`'s weights; "
            f"launch with accelerate_configs/ddp.yaml, or take `quantization` out"
        )
    yield from _rollouts(recipe, launch)


def _precision(recipe: Recipe, launch: Launch) -> Iterator[ChatalignError]:
    train = recipe.train  # type: ignore[union-attr]
    asked = launch.mixed_precision
    if asked not in ("bf16", "fp16"):  # "no" leaves it to the recipe
        return
    says = "fp16" if train.fp16 else {True: "bf16", False: "no", None: None}[train.bf16]
    if says is not None and says != asked:
        own = "train.fp16: true" if train.fp16 else f"train.bf16: {str(train.bf16).lower()}"
        yield GuardError(
            f"{launch.where}: `mixed_precision: {asked}` contradicts `{own}`; "
            f"set `mixed_precision: no` there (the recipe then decides), or change the recipe"
        )


def _rollouts(recipe: Recipe, launch: Launch) -> Iterator[ChatalignError]:
    ppo = getattr(recipe, "ppo", None)
    if ppo is not None and ppo.rollout_batch_size % (ppo.num_mini_batches * launch.processes):
        yield GuardError(
            f"{launch.where}: `ppo.rollout_batch_size: {ppo.rollout_batch_size}` can't be shared out over "
            f"{launch.processes} processes in `ppo.num_mini_batches: {ppo.num_mini_batches}`; "
            f"make it a multiple of {ppo.num_mini_batches * launch.processes}"
        )


def gpus_here(environment: Mapping[str, str] = os.environ) -> int | None:
    """At most how many NVIDIA GPUs this process may use; None where there is no NVIDIA driver."""
    if not _NVIDIA.is_dir():
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(_NVIDIA.iterdir()))


def default_config() -> Path | None:
    """The file that ``accelerate launch`` reads where it is given none, if it is there."""
    home = (
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    )
    file = Path(home).expanduser() / "accelerate" / "default_config.yaml"
    return file if file.is_file() else None


def _number(value: Any) -> Any:
    """A number given as one or as text; None for ``auto`` and for nothing."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else number
