"""What bench/scaling.py measures: each piece in a forked process, so that memory is its own and imports are done.

Steps are the engine's: its attention, fused layers, loss head, clipping and fused AdamW, on made tokens, without the
trainer around them; a distributed run is a whole stage.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import harness
import torch
import workload
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

import chatalign
from chatalign.data import prepare
from chatalign.data.collate import collate_lm, collate_pairs
from chatalign.engine import attention, loss_head
from chatalign.engine.batching import make_bins, row_lengths
from chatalign.engine.dpo_trainer import sequence_logprobs
from chatalign.engine.fused_layers import fuse_layers
from chatalign.engine.isolation import enable_segments
from chatalign.maths.preference import dpo_loss
from chatalign.recipe import DataSection

Head = Literal["auto", "plain", "chunked"]
Measured = dict[str, float]
HEAD_SIZE = 64
_STEPS, _WARM = 8, 2  # of a distributed run


def forked(work: Callable[..., Measured], *args: Any, **settings: Any) -> Measured:
    """What `work` returns, run in a fork of this process; this process must have run nothing with torch's threads."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, args, settings)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def llama(*, vocabulary: int, hidden: int, layers: int) -> Any:
    """A random-init Llama with tied embeddings, set up as the engine does on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).train()
    fuse_layers(model)
    enable_segments(model)
    return model


def matmul_parameters(model: Any) -> int:
    """Weights that every token is multiplied with, the head's among them."""
    return sum(p.numel() for p in model.parameters() if p.dim() == 2)


def documents(count: int, length: int, vocabulary: int) -> dict[str, Any]:
    """A flat batch of `count` documents, all of it supervised."""
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return dict(collate_lm([{"input_ids": row, "supervised": [1] * length} for row in ids]))


# The pieces.


def data_preparation(file: str, tokenizer: str) -> Measured:
    """Rows of a file to bins, nothing cached; memory is the peak above what imports and tokenizer took."""
    datasets.disable_caching()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    section = DataSection(datasets=[{"path": file}], max_length=2048)
    before, started = harness.peak_mb(), time.process_time()
    rows = prepare(section, loaded, "conversation", seed=0).train
    make_bins(rows, row_lengths(rows), section.max_length)
    return {"cpu_s": time.process_time() - started, "memory_mb": harness.peak_mb() - before}


def sft_step(
    *, vocabulary: int, hidden: int, layers: int, count: int, length: int, head: Head = "auto", timed: int = 1
) -> Measured:
    """A full-parameter step: CPU seconds, attention's among them, and memory above the model's."""
    model = llama(vocabulary=vocabulary, hidden=hidden, layers=layers)
    if head != "plain":
        loss_head.enable_chunked_head(model)
    if head == "chunked":
        loss_head._PLAIN_LOGITS_BYTES = 0
    batch = documents(count, length, vocabulary)
    before = harness.peak_mb()
    step = _stepper(model, lambda: -loss_head.token_logprobs(model, batch)[0].mean())
    return {
        "cpu_s": _median_time(step, timed),
        "memory_mb": harness.peak_mb() - before,
        "attention_s": layers * _median_time(lambda: _attention(batch, hidden), timed),
        "matmul_parameters": matmul_parameters(model),
    }


def dpo_step(*, pairs: int, prompt: int, reply: int, shared: bool) -> Measured:
    """A full-parameter step, policy and reference; `shared` lets chosen and rejected have one prompt."""
    settings = {"vocabulary": 2048, "hidden": 128, "layers": 2}
    model, reference = llama(**settings), llama(**settings)
    draw = torch.Generator().manual_seed(0)
    rows = [[torch.randint(2048, (n,), generator=draw).tolist() for n in (prompt, reply, reply)] for _ in range(pairs)]
    if shared:
        batch = collate_pairs(
            [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in rows]
        )
    else:
        marks = [0] * prompt + [1] * reply
        batch = collate_lm([{"input_ids": row[0] + side, "supervised": marks} for row in rows for side in row[1:]])

    def loss() -> torch.Tensor:
        logps, _ = sequence_logprobs(model, dict(batch))
        with torch.no_grad():
            expected, _ = sequence_logprobs(reference, dict(batch))
        sides = {"chosen_logps_B": logps[0::2], "rejected_logps_B": logps[1::2]}
        found = dpo_loss(**sides, ref_chosen_logps_B=expected[0::2], ref_rejected_logps_B=expected[1::2])
        return found.losses_B.mean()

    return {"cpu_s": _median_time(_stepper(model, loss), 3)}


def _stepper(model: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> None:
        loss().backward()
        if not torch.nn.utils.clip_grad_norm_(trained, 1.0) > 0:
            raise SystemExit("the gradient is 0: nothing was measured")
        optimizer.step()
        optimizer.zero_grad()

    return step


def _attention(batch: dict[str, Any], hidden: int) -> None:
    """One layer's attention, forward and backward."""
    plan = attention.segment_inputs(batch)["segments"]
    shape = (1, hidden // HEAD_SIZE, batch["input_ids"].shape[1], HEAD_SIZE)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    output, _ = attention.segment_attention_forward(torch.nn.Identity(), q, k, v, None, segments=plan)
    output.backward(torch.ones_like(output))


def _median_time(work: Callable[[], None], timed: int) -> float:
    """CPU seconds of `work`, after one run that doesn't count."""
    work()
    seconds = []
    for _ in range(timed):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return median(seconds)


# A distributed run, with the environment that torchrun gives, and without its start.


def distributed(processes: int) -> Measured:
    """A short SFT run of 1,024 tokens a process and step: CPU seconds a step over all processes, and by the clock."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = {"per_device_train_batch_size": 2, "max_steps": _STEPS, "save_strategy": "no", "use_cpu": True}
        recipe = {
            "stage": "sft",
            "output_dir": str(folder / "run"),
            "model": {"name_or_path": str(workload.model_folder("3.4M"))},
            "data": {"datasets": [{"path": str(workload.rows_file("sft"))}], "max_length": 512},
            "train": train,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        started = [context.Process(target=_rank, args=(folder, rank, processes, port)) for rank in range(processes)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise SystemExit(f"{processes} processes: {(folder / 'output-0.txt').read_text()[-3000:]}")
        spans = [json.loads((folder / f"clocks-{rank}.json").read_text()) for rank in range(processes)]
    return {"cpu_s": sum(span["cpu_s"] for span in spans), "wall_s": median(span["wall_s"] for span in spans)}


def _rank(folder: Path, rank: int, processes: int, port: int) -> None:
    """One process of the run; writes its clocks, and what it says into a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    with (folder / f"output-{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # the callback interface
            marks.append((time.process_time(), time.perf_counter()))

    train = Trainer.train

    def watched_train(self: Any, *args: Any, **kwargs: Any) -> Any:  # the trainer's own signature
        self.add_callback(Clock())
        return train(self, *args, **kwargs)

    Trainer.train = watched_train
    chatalign.run_stage(chatalign.load_recipe(folder / "recipe.yaml"))
    steps = len(marks) - _WARM
    cpu, wall = ((marks[-1][clock] - marks[_WARM - 1][clock]) / steps for clock in (0, 1))
    (folder / f"clocks-{rank}.json").write_text(json.dumps({"cpu_s": cpu, "wall_s": wall}))
