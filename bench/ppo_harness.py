"""What PPO's arms share: a clock that is always in one phase, the optimizer steps that are really made, one JSON line.

CPU seconds are the process's. An iteration is a rollout and its update; the first is warm-up. Response tokens are
counted through the stop token, however long the row that they stand in is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ppo_work
from harness import peak_mb

WARM = 1
WORKS = ("equal", "unequal", "lora", "lora-equal")
PHASES = ("rollout", "scoring", "update")


def arguments() -> argparse.Namespace:
    """The command line that every PPO arm takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", choices=WORKS, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--variant", default="default")
    parser.add_argument("--iterations", type=int, default=2, help="timed ones")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def work_of(args: argparse.Namespace) -> ppo_work.PpoWork:
    """The files of an arm's work; LoRA is measured where replies end by themselves, and at equal lengths too."""
    return ppo_work.files(args.size, lengths_of(args.work))


def lengths_of(work: str) -> ppo_work.Lengths:
    """Whether a work's replies are all as long."""
    return "equal" if work.endswith("equal") and work != "unequal" else "unequal"


@dataclass
class Iteration:
    """CPU seconds by phase, and what was drawn."""

    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall_s: float = 0.0
    replies: int = 0
    tokens: int = 0
    steps: int = 0


class Clock:
    """Phases of a run of PPO, iteration by iteration; `enter` says what begins."""

    def __init__(self) -> None:
        self.iterations = [Iteration()]
        self.phase: str | None = None
        self.first_grad_norm = 0.0
        self._since = (0.0, 0.0)

    def enter(self, phase: str) -> None:
        """The phase before ends, and `phase` begins."""
        now = (time.process_time(), time.perf_counter())
        if self.phase is not None:
            self.iterations[-1].cpu_s[self.phase] += now[0] - self._since[0]
            self.iterations[-1].wall_s += now[1] - self._since[1]
        self.phase, self._since = phase, now

    def end_iteration(self) -> None:
        """An iteration's update is done."""
        self.enter("rollout")
        self.iterations.append(Iteration())

    def drew(self, lengths: list[int]) -> None:
        """Replies of these lengths were drawn."""
        self.iterations[-1].replies += len(lengths)
        self.iterations[-1].tokens += sum(lengths)

    def watch_optimizer(self) -> None:
        """Count every optimizer's steps from now on, and take the gradient's norm at the first."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        def before_step(optimizer: Any, *_: Any) -> None:
            self.iterations[-1].steps += 1
            if not self.first_grad_norm:
                parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                self.first_grad_norm = float(sum(p.grad.double().pow(2).sum() for p in parameters) ** 0.5)

        register_optimizer_step_pre_hook(before_step)


def finish(clock: Clock, args: argparse.Namespace, arm: str, first: dict[str, float], probe: dict[str, Any]) -> None:
    """Write the result. Refuses one without a gradient, or whose iterations have not one optimizer step an epoch."""
    done = [iteration for iteration in clock.iterations if iteration.replies]
    timed = done[WARM:]
    steps = {iteration.steps for iteration in done}
    if not timed or steps != {ppo_work.EPOCHS} or not clock.first_grad_norm > 0:
        raise SystemExit(f"{arm}: optimizer steps {steps}, gradient norm {clock.first_grad_norm}: not the same work")
    cpu_s = {phase: sum(i.cpu_s[phase] for i in timed) / len(timed) for phase in PHASES}
    tokens, replies = sum(i.tokens for i in timed), sum(i.replies for i in timed)
    total = sum(cpu_s.values()) * len(timed)
    prompts = ppo_work.read(work_of(args).prompts)
    result = {
        "arm": arm,
        "bench": "ppo",
        "work": args.work,
        "model": args.size,
        "dtype": args.dtype,
        "iterations": len(timed),
        "replies": replies,
        "tokens": tokens,
        "prompt_tokens": _prompt_tokens(args, prompts),
        "cpu_s": cpu_s,
        "wall_s": sum(i.wall_s for i in timed) / len(timed),
        "items_per_cpu_s": tokens / total,
        "replies_per_cpu_s": replies / total,
        "peak_mb": peak_mb(),
        "steps": ppo_work.EPOCHS,
        "first_grad_norm": clock.first_grad_norm,
        "first": first,
        "probe": probe,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        "versions": versions("torch", "transformers", "peft", "accelerate", "datasets"),
    }
    Path(args.out).write_text(json.dumps(result) + "\n")


def versions(*names: str) -> dict[str, str]:
    """Of the packages that are there, the toolkit's own first."""
    found = {}
    for name in ("chatalign", "trl", *names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _prompt_tokens(args: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """Tokens of all prompts, which is what one rollout answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work_of(args).policy)
    return sum(len(ppo_work.tokenized(tokenizer, row)) for row in rows)
