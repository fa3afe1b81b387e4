"""What a run uses of the machine it is on: the recipe's word where it gives one, else what the hardware has.

On a GPU with bfloat16 arithmetic: mixed precision (``train.bf16``), TensorFloat-32 for what stays in float32 beside
it, and Liger's kernels where they are installed. On a CPU: layers with fused norms, rotary embedding, gated units and
LoRA products. Each is a key of the recipe, and what a run used is in its artifact and report.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from chatalign.errors import DependencyError, RecipeError
from chatalign.recipe import StageRecipe

# Read here and by the trainer, not passed on to TrainingArguments as they stand.
KEYS = frozenset(
    {
        "bf16",
        "tf32",
        "torch_compile",
        "use_liger_kernel",
        "liger_kernel_config",
        "fused_layers",
        "activation_offloading",
        "gradient_checkpointing",
    }
)
# The loss is the native engine's own: Liger's would take the place of the forward pass that gives it logits.
LIGER_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What decides: the device, whether it computes in bfloat16, and whether Liger's kernels are installed."""

    device: Literal["cuda", "cpu", "other"]
    bf16: bool = False
    liger: bool = False


@dataclass(frozen=True, kw_only=True)
class Levers:
    """What a run uses. `liger` is the kernels' configuration, None where they are not used."""

    bf16: bool
    tf32: bool | None
    liger: dict[str, bool] | None
    fused: bool
    compile: bool
    offload: bool
    checkpointing: bool | Literal["auto"]

    def arguments(self) -> dict[str, Any]:
        """The ``TrainingArguments`` that follow; compiling, Liger and offloading are the engine's own."""
        return {
            name: value
            for name, value in (
                ("bf16", self.bf16),
                ("tf32", self.tf32),
                ("gradient_checkpointing", self.checkpointing is True),
            )
            if value is not None and value is not False
        }


def hardware(*, use_cpu: bool) -> Hardware:
    """The machine that this process runs on; asks nothing of a GPU that won't be used."""
    if use_cpu or not torch.accelerator.is_available():
        return Hardware(device="cpu")
    if not torch.cuda.is_available():
        return Hardware(device="other")
    # Older GPUs emulate bfloat16, slower than float32.
    half = torch.cuda.is_bf16_supported(including_emulation=False)
    return Hardware(device="cuda", bf16=half, liger=find_spec("liger_kernel") is not None)


def choose(recipe: StageRecipe, machine: Hardware) -> Levers:
    """The recipe's levers on a machine.

    Raises RecipeError for one that this machine can't pull, DependencyError for a package that isn't installed.
    """
    train = recipe.train
    _require_device(recipe, machine)
    bf16 = machine.bf16 and not train.fp16 if train.bf16 is None else train.bf16
    liger = train.use_liger_kernel
    if liger and not machine.liger:
        raise DependencyError("`train.use_liger_kernel` needs liger-kernel; pip install 'chatalign[gpu]'")
    if liger is None:  # compiled layers are fused already, and PPO's also decode
        native = recipe.stage not in ("ppo", "kto") and getattr(recipe, "engine", "native") == "native"
        liger = machine.liger and native and not train.torch_compile
    return Levers(
        bf16=bf16,
        # Who asks for float32 alone gets float32.
        tf32=(machine.device == "cuda" and bf16 and machine.bf16) or None if train.tf32 is None else train.tf32,
        liger={**LIGER_LOSSES, **(train.liger_kernel_config or {})} if liger else None,
        fused=machine.device == "cpu" if train.fused_layers is None else train.fused_layers,
        compile=train.torch_compile,
        offload=train.activation_offloading,
        checkpointing=train.gradient_checkpointing,
    )


def _require_device(recipe: StageRecipe, machine: Hardware) -> None:
    if machine.device != "cpu" and recipe.train.fused_layers:
        raise RecipeError("`train.fused_layers: true` is for a CPU; leave it out, a GPU takes `train.use_liger_kernel`")
    if machine.device == "cuda":
        return
    wanted = {
        "train.use_liger_kernel: true": bool(recipe.train.use_liger_kernel),
        "train.activation_offloading: true": recipe.train.activation_offloading,
        f"model.attention: {recipe.model.attention}": recipe.model.attention in ("varlen", "flex"),
    }
    for setting, given in wanted.items():
        if given:
            raise RecipeError(f"`{setting}` needs an NVIDIA or AMD GPU, and this run has none; leave it out")


def described(
    levers: Levers, *, attention: Collection[str], optim: str, fp16: bool, checkpointed: int, layers: int
) -> str:
    """One line for the run's record: ``attention: varlen, bf16, adamw_torch_fused``."""
    parts = [f"attention: {'+'.join(sorted(attention)) or 'not checked'}"]
    parts.append("bf16" if levers.bf16 else "fp16" if fp16 else "float32")
    parts.append(optim)
    parts += [
        name
        for name, used in (
            ("tf32", levers.tf32),
            ("Liger kernels", levers.liger is not None),
            ("fused layers", levers.fused),
            ("compiled layers", levers.compile),
            ("activations offloaded", levers.offload),
        )
        if used
    ]
    if checkpointed:
        parts.append(f"{checkpointed} of {layers} layers checkpointed")
    return ", ".join(parts)
