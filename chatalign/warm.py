"""One warm process for a chain's stages: each begins as in a process of its own, and gives back what it held.

Stages leave things behind, through transformers, accelerate and trackers: environment variables (deterministic
algorithms, a compiler's backend), PyTorch's modes, functions that were replaced in models' modules, singletons with
the first stage's device and precision, an open wandb run. A test holds a chain's weights to those of stages that each
had a process.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from chatalign.engine.replaced import put_back

# What torch and oneDNN read when they start, for training on a CPU (measured: SFT of 7M weights in bf16, 0.7 of the
# memory at the same speed). Large blocks on huge pages are given back when they are freed, instead of being kept in
# pieces. Each compiled kernel that is kept holds its place in the heap between a batch's tensors: few are. An adapter's
# step has 22 kinds of products, makes each kernel anew where it isn't kept, and has memory to spare (measured at 25M:
# 1.12 × the speed for 1.13 × the memory; full fine-tuning 1.02 to 1.06 × for 1.03 ×).
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_FEW, _ADAPTERS = "8", "32"


def import_once(name: str, *, adapter: bool = False) -> ModuleType:
    """Import a stage's module; in a process that hasn't torch yet, without the garbage collector.

    The imports make a million objects and no garbage, and collections take a third of their time. Frozen, they are
    not walked by later collections either, training's and the one at the process's end among them. Such a process
    also gets the variables that keep a CPU's training small, those that the user has not set; `adapter` says that an
    adapter will be trained.
    """
    if "torch" not in sys.modules:
        sparing = _HUGE_PAGES | dict.fromkeys(_KERNELS, _ADAPTERS if adapter else _FEW)
        os.environ.update({name: value for name, value in sparing.items() if name not in os.environ})
    if "torch" in sys.modules or not gc.isenabled():  # then others' objects are about: they mustn't be kept for good
        return import_module(name)
    gc.collect()
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def as_if_alone() -> Iterator[None]:
    """Run a stage inside; afterwards the process is as it was, its modules excepted. Torch must be imported."""
    environment = dict(os.environ)
    modes = _torch_modes()
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        _finish_wandb()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        root.setLevel(level)
        root.handlers[:] = handlers
        _set_torch_modes(modes)
        put_back()
        _give_back()


def _torch_modes() -> dict[str, Any]:
    import torch

    backends: Any = torch.backends  # its stubs lack `fp32_precision`
    return {
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "fp32_precision": backends.fp32_precision,
        "grad": torch.is_grad_enabled(),
    }


def _set_torch_modes(modes: dict[str, Any]) -> None:
    import torch

    backends: Any = torch.backends
    torch.set_default_dtype(modes["dtype"])
    torch.use_deterministic_algorithms(modes["deterministic"], warn_only=modes["warn_only"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = modes["cudnn"]
    backends.fp32_precision = modes["fp32_precision"]
    torch.set_grad_enabled(modes["grad"])


def _finish_wandb() -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def _give_back() -> None:
    """Let the next stage choose its own device and precision, and free what the last one held."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    AcceleratorState._reset_state(reset_partial_state=alone)
    GradientState._reset_state()
    torch.compiler.reset()  # recompilations are counted over the process, and past a few a function runs uncompiled
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
