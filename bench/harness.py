"""What all training arms share: a clock around the steps, a probe of loss and gradient, and one line of JSON.

``install`` puts both on ``transformers.Trainer``, which chatalign's, TRL's and LLaMA-Factory's trainers all are, so
that every arm is measured by the same code, in its own process, through its own public entry. CPU time is the
process's, over the steps after the first ``WARM_STEPS``; items are counted from the batches that the model was given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM_STEPS = 4  # compiled layers meet their second kind of batch in the third step
SHARES = 40  # of an arm's timed steps: one at a time where arms step in turn
LEARNING_RATE = 1e-4
BATCH, PACKS = 8, 4  # rows a step where rows are padded; packs of 512 tokens where they are packed
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Count = Callable[[dict[str, Any]], int]
Probe = Callable[[Any], float]


@dataclass
class Measured:
    """Marks of (CPU seconds, wall seconds) after each step, and what each step trained on."""

    marks: list[tuple[float, float]] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    probe: dict[str, float] = field(default_factory=dict)
    memory_before_mb: float = 0.0
    trainable: int = 0


def arguments() -> argparse.Namespace:
    """The command line that every arm takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True)
    parser.add_argument("--model", required=True, help="a folder of workload.py")
    parser.add_argument("--rows", required=True)
    parser.add_argument("--probe", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--variant", choices=["default", "tuned"], default="default")
    return parser.parse_args()


def read_rows(file: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB, without what is mapped from files.

    Those pages are libraries' code. The kernel can drop them, and how many are mapped hangs on how it read the file:
    130 MB more in an environment just installed than in the same one read from disk (measured).
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak_kb, files_kb = (int(status[name].split()[0]) for name in ("VmHWM", "RssFile"))
    return (peak_kb - files_kb) / 1024


def mark(measured: Measured) -> None:
    """Note the clocks; an arm without a Trainer calls it after each step."""
    measured.marks.append((time.process_time(), time.perf_counter()))


def wait_for_turn(step: int, steps: int) -> None:
    """Before `step` of `steps`, where arms step in turn: at the end of a share hand on, and wait to be told to go on.

    ``processes.py`` gives the two pipes, in the environment. What comes before the first timed step is one share more;
    a share of less than a step is handed on as it is, so that all arms are halfway, and end, in the same round.
    """
    pipes = os.environ.get("BENCH_TURNS")
    if pipes is None or step < WARM_STEPS:
        return
    ended, ended_before = ((at - WARM_STEPS) * SHARES // (steps - WARM_STEPS) for at in (step, step - 1))
    tell, told = map(int, pipes.split())
    for _ in range(ended - ended_before if step > WARM_STEPS else 1):
        os.write(tell, b".")
        if not os.read(told, 1):
            raise SystemExit("the bench that told this arm when to step has ended")


def install(count: Count, probe: Probe) -> Measured:
    """Watch the next ``Trainer.train``: `probe` before it, `count` of each micro-batch, the clocks after each step.

    `probe` gives the mean loss over the arm's evaluation rows, having called backward on it; the gradient norm is
    taken here and the gradients dropped.
    """
    import transformers

    measured = Measured()

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            wait_for_turn(state.global_step, state.max_steps)

        def on_step_end(self, args, state, control, **kwargs):  # the callback interface
            mark(measured)

    train, training_step = transformers.Trainer.train, transformers.Trainer.training_step

    def watched_train(self, *args, **kwargs):  # the trainer's own signature
        self.add_callback(Clock())
        self.model.train()
        measured.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        measured.probe = {"probe_loss": probe(self), "probe_grad_norm": gradient_norm(self.model)}
        self.model.zero_grad()
        measured.memory_before_mb = peak_mb()
        return train(self, *args, **kwargs)

    def watched_step(self, model, inputs, *args, **kwargs):
        if len(measured.items) == len(measured.marks):
            measured.items.append(0)
        measured.items[-1] += count(inputs)
        loss = training_step(self, model, inputs, *args, **kwargs)
        measured.losses.append(float(loss))
        return loss

    transformers.Trainer.train, transformers.Trainer.training_step = watched_train, watched_step
    return measured


def gradient_norm(model: Any) -> float:
    """The 2-norm of all gradients; 0 would mean that nothing is learnt."""
    return float(sum(p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None) ** 0.5)


def finish(measured: Measured, args: argparse.Namespace, arm: str, versions: list[str]) -> None:
    """Write the result; refuses one without a gradient, or with too few steps to say anything."""
    steps = len(measured.marks) - WARM_STEPS
    if steps < 3 or not measured.probe["probe_grad_norm"] > 0:
        raise SystemExit(f"{arm}: {steps} timed steps, gradient norm {measured.probe}: nothing was measured")
    (cpu_start, wall_start), (cpu_end, wall_end) = measured.marks[WARM_STEPS - 1], measured.marks[-1]
    items = sum(measured.items[WARM_STEPS:])
    result = {
        "arm": arm,
        "work": args.work,
        "model": Path(args.model).name.removeprefix("llama-").removesuffix("-score"),
        "dtype": args.dtype,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        "steps": steps,
        "items": items,
        "items_all": sum(measured.items),
        "cpu_s": cpu_end - cpu_start,
        "wall_s": wall_end - wall_start,
        "items_per_cpu_s": items / (cpu_end - cpu_start),
        "peak_mb": peak_mb(),
        "training_mb": peak_mb() - measured.memory_before_mb,
        "trainable": measured.trainable,
        "first_loss": measured.losses[0],
        "last_loss": measured.losses[-1],
        "versions": {name: importlib.metadata.version(name) for name in ["torch", "transformers", *versions]},
        **measured.probe,
    }
    with Path(args.out).open("a") as file:
        file.write(json.dumps(result) + "\n")
