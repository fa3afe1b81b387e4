"""The floor: how fast this machine multiplies matrices of the shapes that PPO's phases have, and nothing else.

``decode`` are 64 rows through every linear layer; ``forward`` a batch's tokens; ``full`` the same with both gradients;
``lora`` with the inputs' gradients alone. All in seconds a token, process CPU time, the best of several rounds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ppo_harness
import ppo_work
import torch
import workload
from torch import Tensor

ARGS = ppo_harness.arguments()
ROUNDS = 5


def shapes(size: workload.Size) -> list[tuple[int, int]]:
    """(out, in) of every matrix that a token is multiplied with, the output layer included."""
    layer = [(size.hidden, size.hidden)] * 4 + [(size.intermediate, size.hidden)] * 2
    return [*layer, (size.hidden, size.intermediate)] * size.layers + [(size.vocabulary, size.hidden)]


def seconds_a_token(products: Callable[[Tensor, Tensor, Tensor], None], rows: int, dtype: torch.dtype) -> float:
    """CPU seconds of `products` on input, weight and output gradient over all layers, by token."""
    work = [
        tuple(torch.randn(shape).to(dtype) for shape in ((rows, inner), (outer, inner), (rows, outer)))
        for outer, inner in shapes(workload.SIZES[ARGS.size])
    ]
    times = []
    for _ in range(ROUNDS + 1):
        started = time.process_time()
        for inputs, weight, gradient in work:
            products(inputs, weight, gradient)
        times.append(time.process_time() - started)
    return min(times[1:]) / rows


def main() -> None:
    """Measure the four, and write them with the FLOP that they stand for."""
    dtype = torch.bfloat16 if ARGS.dtype == "bfloat16" else torch.float32
    rows = ppo_work.PROMPTS * (ppo_work.EQUAL_PROMPT_TOKENS + ppo_work.RESPONSE)

    def forward(x: Tensor, w: Tensor, g: Tensor) -> None:
        x @ w.T

    def lora(x: Tensor, w: Tensor, g: Tensor) -> None:
        x @ w.T
        g @ w

    def full(x: Tensor, w: Tensor, g: Tensor) -> None:
        lora(x, w, g)
        g.T @ x

    with torch.no_grad():
        found = {
            "decode": seconds_a_token(forward, ppo_work.PROMPTS, dtype),
            "forward": seconds_a_token(forward, rows, dtype),
            "lora": seconds_a_token(lora, rows, dtype),
            "full": seconds_a_token(full, rows, dtype),
        }
    parameters = sum(outer * inner for outer, inner in shapes(workload.SIZES[ARGS.size]))
    flop = {"decode": 2, "forward": 2, "lora": 4, "full": 6}
    result = {
        "bench": "ppo-floor",
        "arm": f"floor-{ARGS.dtype}",
        "model": ARGS.size,
        "dtype": ARGS.dtype,
        "matmul_parameters": parameters,
        "s_a_token": found,
        "gflops": {name: flop[name] * parameters / seconds / 1e9 for name, seconds in found.items()},
        "versions": ppo_harness.versions("torch"),
    }
    Path(ARGS.out).write_text(json.dumps(result) + "\n")


main()
