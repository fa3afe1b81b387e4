"""What bench/gpu.py measures: models by their shape, rows by their lengths, arms by what they switch, in order.

Standard library alone, so that planning costs nothing. Importance falls down the list: a run that stops early has
the headline (each work with chatalign's defaults and TRL's best arms) before it has each lever's gain.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Size:
    """A Llama by its shape."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = True

    @property
    def matmul_parameters(self) -> int:
        """N of the FLOP formula: every weight that is multiplied with, the output layer included, no embedding."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary


SIZES = {
    "0.5B": Size(896, 24, 14, 2, 64, 4864, 151_936),  # Qwen2.5-0.5B's shape
    "1.2B": Size(2048, 16, 32, 8, 64, 8192, 128_256),  # Llama-3.2-1B's
    "3.2B": Size(3072, 28, 24, 8, 128, 8192, 128_256),  # Llama-3.2-3B's
    "8B": Size(4096, 32, 32, 8, 128, 14_336, 128_256, tied=False),  # Llama-3.1-8B's
    "tiny": Size(64, 2, 4, 2, 16, 128, 512),
}
# Mean and spread of lognormal lengths; 0 spread: all rows that long.
LENGTHS = {
    "instruct": (150, 0.8),
    "chat": (850, 0.6),
    "4k": (4096, 0.0),
    "short": (70, 0.7),  # a pair's prompt; replies below
    "long": (250, 0.7),
}
REPLIES = {"short": (70, 0.7), "long": (600, 0.5)}


@dataclass(frozen=True)
class Work:
    """One thing to train. A step is `batch` packs of `max_length` tokens, or `batch` pairs.

    Batches are such that TRL's padded and unshared rows fit into 80 GB as well, without recomputation; where nothing
    does (`checkpointing`), every arm recomputes every layer.
    """

    name: str
    stage: str  # sft, dpo, reward
    size: str
    tuning: str  # full, lora, qlora
    lengths: str
    max_length: int
    batch: int
    steps: int = 20
    warm: int = 5
    checkpointing: bool = False

    @property
    def unit(self) -> str:
        """What is counted."""
        return "tokens" if self.stage == "sft" else "pairs"

    @property
    def rows_a_step(self) -> int:
        """Rows of one padded step that hold about as many tokens as a packed one."""
        return self.batch if self.stage != "sft" else max(1, self.batch * self.max_length // LENGTHS[self.lengths][0])


WORKS = {
    work.name: work
    for work in (
        Work("sft-1.2B-chat", "sft", "1.2B", "full", "chat", 2048, 4),
        Work("sft-1.2B-4k", "sft", "1.2B", "full", "4k", 4096, 2),
        Work("dpo-1.2B-short", "dpo", "1.2B", "full", "short", 2048, 16),
        Work("dpo-1.2B-long", "dpo", "1.2B", "full", "long", 2048, 4),
        Work("reward-1.2B-short", "reward", "1.2B", "full", "short", 2048, 16),
        Work("sft-0.5B-instruct", "sft", "0.5B", "full", "instruct", 2048, 4),
        Work("lora-8B-chat", "sft", "8B", "lora", "chat", 2048, 2, steps=10),
        Work("qlora-8B-chat", "sft", "8B", "qlora", "chat", 2048, 2, steps=10),
        Work("lora-1.2B-chat", "sft", "1.2B", "lora", "chat", 2048, 4),
        Work("sft-3.2B-4k", "sft", "3.2B", "full", "4k", 4096, 1, steps=10, checkpointing=True),
    )
}
QUICK = {
    work.name: work
    for work in (
        Work("sft-tiny", "sft", "tiny", "full", "instruct", 256, 2, steps=3, warm=1),
        Work("dpo-tiny", "dpo", "tiny", "full", "short", 256, 4, steps=3, warm=1),
        Work("reward-tiny", "reward", "tiny", "full", "short", 256, 4, steps=3, warm=1),
        Work("lora-tiny", "sft", "tiny", "lora", "instruct", 256, 2, steps=3, warm=1),
        Work("qlora-tiny", "sft", "tiny", "qlora", "instruct", 256, 2, steps=3, warm=1),
    )
}


@dataclass(frozen=True)
class Arm:
    """Who trains, and which recipe keys (chatalign, dotted) or arguments (TRL) differ from the defaults."""

    name: str
    engine: str  # chatalign, trl
    change: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None  # a package
    gpu_only: bool = False


OURS = Arm("chatalign", "chatalign")
# TRL's own defaults recompute every layer; at its best here it packs, recomputes nothing, and has Liger if it is there.
_TUNED = {"gradient_checkpointing": False}
TRL = (
    Arm("trl tuned, sdpa", "trl", _TUNED | {"packing": True}),
    Arm("trl tuned, flex", "trl", _TUNED | {"packing": True, "attn": "flex_attention"}, gpu_only=True),
    Arm("trl tuned, sdpa, Liger", "trl", _TUNED | {"packing": True, "use_liger_kernel": True}, "liger_kernel", True),
    Arm("trl default", "trl"),
)
LEVERS = (
    Arm("attention: sdpa", "chatalign", {"model.attention": "sdpa"}),
    Arm("attention: flex", "chatalign", {"model.attention": "flex"}, gpu_only=True),
    Arm("compiled layers", "chatalign", {"train.torch_compile": True}),
    Arm("without Liger", "chatalign", {"train.use_liger_kernel": False}, "liger_kernel", True),
    Arm("float32", "chatalign", {"train.bf16": False}, gpu_only=True),
    Arm("float32 in TF32", "chatalign", {"train.bf16": False, "train.tf32": True}, gpu_only=True),
    Arm("AdamW not fused", "chatalign", {"train.optim": "adamw_torch"}),
    Arm("8-bit AdamW", "chatalign", {"train.optim": "adamw_bnb_8bit"}, "bitsandbytes", True),
    Arm("no packing", "chatalign", {"data.packing": False}),
    Arm("all layers checkpointed", "chatalign", {"train.gradient_checkpointing": True}),
    Arm("checkpointed by memory", "chatalign", {"train.gradient_checkpointing": "auto"}),
    Arm("activations offloaded", "chatalign", {"train.activation_offloading": True}, gpu_only=True),
)
# Works on which a lever is tried: one where it can matter, and attention where prefixes are shared too.
_ON_PAIRS = ("attention: sdpa", "attention: flex", "compiled layers")


def plan(works: dict[str, Work], *, device: str, installed: set[str]) -> list[tuple[Work, Arm]]:
    """All pairs of work and arm, the most important first: us against TRL's best everywhere, then levers, then rest."""
    headline = [(work, arm) for work in works.values() for arm in (OURS, *TRL[:1])]
    best = [(work, arm) for work in works.values() for arm in TRL[1:3]]
    tried = [work for work in works.values() if work.stage == "sft" and work.tuning == "full"][:1]
    levers = [(work, arm) for work in tried for arm in LEVERS]
    pairs = [work for work in works.values() if work.stage == "dpo"]
    levers += [(work, arm) for work in pairs for arm in LEVERS if arm.name in _ON_PAIRS]
    default = [(work, TRL[-1]) for work in works.values()]
    wanted = headline + levers[:3] + best + levers[3:] + default
    return [
        (work, arm)
        for work, arm in wanted
        if (arm.needs is None or arm.needs in installed)
        and not (arm.gpu_only and device == "cpu")
        and not (arm.engine == "trl" and "trl" not in installed)
        and not (work.tuning == "qlora" and "bitsandbytes" not in installed)
    ]


def draw_lengths(name: str, count: int, longest: int, *, seed: int) -> list[int]:
    """Lengths with the mean and spread of :data:`LENGTHS`, between 8 and `longest`."""
    return _drawn(LENGTHS[name], count, longest, seed)


def draw_replies(name: str, count: int, longest: int, *, seed: int) -> list[int]:
    """The same for the replies of pairs."""
    return _drawn(REPLIES[name], count, longest, seed)


def _drawn(shape: tuple[int, float], count: int, longest: int, seed: int) -> list[int]:
    mean, spread = shape
    if not spread:
        return [min(mean, longest)] * count
    draw = random.Random(seed)
    # A lognormal's mean is median · exp(σ² / 2).
    values = [draw.lognormvariate(0, spread) * mean / 2.718281828 ** (spread**2 / 2) for _ in range(count)]
    return [max(8, min(longest, round(value))) for value in values]


def training_flops(size: Size, lengths: list[int], *, full: bool) -> float:
    """Model FLOPs of a training step over documents: Σ (6 N t + 6 L d t²), d = heads × head size; 4 N with adapters.

    Forward 2 N a token, backward twice that, or once where weights need no gradient. Attention is causal: half of
    12 L d t² for forward and backward. Recomputation and padding count for nothing.
    """
    weights = (6 if full else 4) * size.matmul_parameters
    attention = 6 * size.layers * size.heads * size.head_dim
    return float(sum(weights * t + attention * t * t for t in lengths))
