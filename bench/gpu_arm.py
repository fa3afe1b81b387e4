"""One arm of bench/gpu.py in a process of its own: build, probe, warm up, time, and print one JSON object.

``gpu_arm.py SPEC`` with the JSON of a work and an arm; ``gpu_arm.py --ceilings DEVICE`` measures the machine itself.
Weights are drawn on the device from one seed, so that all arms of a work start from the same model without a file.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_work import SIZES, Arm, Work, draw_lengths, draw_replies, training_flops

STARTED = time.perf_counter()
PROBE_ROWS = 8


def synchronize(device: str) -> None:
    """Wait for the device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def draw_rows(work: Work, count: int, *, seed: int) -> dict[str, list[Any]]:
    """Columns of prepared rows: random ids; a conversation's first third is its prompt, a 4k row is all target."""
    import numpy as np

    draw, vocabulary = np.random.default_rng(seed), SIZES[work.size].vocabulary

    def ids(lengths: list[int]) -> list[list[int]]:
        return [draw.integers(16, vocabulary, length).tolist() for length in lengths]

    lengths = draw_lengths(work.lengths, count, work.max_length, seed=seed)
    if work.stage == "sft":
        prompts = [0 if work.lengths == "4k" else length // 3 for length in lengths]
        marks = [[0] * p + [1] * (n - p) for p, n in zip(prompts, lengths, strict=True)]
        return {"input_ids": ids(lengths), "supervised": marks}
    room = work.max_length // 2
    chosen, rejected = (draw_replies(work.lengths, count, room, seed=seed + side) for side in (1, 2))
    prompts = [min(length, room) for length in lengths]
    return {"prompt_ids": ids(prompts), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected)}


def make_model(work: Work, device: str) -> Any:
    """The random-init model on the device: float32 where all of it is trained, else bfloat16 or 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    size = SIZES[work.size]
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=size.tied,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    loader: Any = AutoModelForSequenceClassification if work.stage == "reward" else AutoModelForCausalLM
    half = work.tuning != "full" and device == "cuda"
    torch.manual_seed(0)
    with torch.device(device):
        model = loader.from_config(config, dtype=torch.bfloat16 if half else torch.float32)
        if work.stage == "reward":  # chatalign's own start, for both (a spread of scores near 1)
            torch.nn.init.normal_(model.score.weight, std=(size.hidden + 1) ** -0.5)
    return quantized(model, device) if work.tuning == "qlora" else model


def quantized(model: Any, device: str) -> Any:
    """Every linear layer but the head in 4-bit NF4, as ``load_in_4bit`` loads it."""
    import torch
    from bitsandbytes import nn as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is not torch.nn.Linear or name == "lm_head":
            continue
        kwargs = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
        new = bnb.Linear4bit(layer.in_features, layer.out_features, bias=False, **kwargs)
        weight = layer.weight.detach().to("cpu")
        new.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        new.support_avx512bf16_for_cpu = False  # else an eval pass on a CPU repacks it, and training rounds otherwise
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.to(device))
        layer.weight.data = torch.empty(0)
    model.is_loaded_in_4bit = True  # read by PEFT
    return model


def make_tokenizer() -> Any:
    """A tokenizer that nothing is read with; trainers want one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def watch(trainer: Any, work: Work, count: Any, device: str) -> dict[str, Any]:
    """Train, and return the seconds of the timed steps, what they trained on, and the first step's end."""
    import transformers

    marks: dict[int, float] = {}
    items: list[int] = []
    losses: list[Any] = []
    training_step = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(marks) >= work.warm:
            items.append(count(inputs))
        losses.append(training_step(model, inputs, *args, **kwargs))
        return losses[-1]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if step in (1, work.warm, work.warm + work.steps):  # no waiting for the device in between
                synchronize(device)
            marks[step] = time.perf_counter()

    trainer.training_step = counted
    trainer.add_callback(Clock())
    trainer.train()
    end = work.warm + work.steps
    gaps = [marks[i + 1] - marks[i] for i in range(work.warm, end)]
    assert all(float(loss) == float(loss) for loss in losses), "a loss is not a number"
    return {
        "seconds": marks[end] - marks[work.warm],
        "items": sum(items),
        "to_first_step_s": marks[1] - STARTED,
        "median_step_s": statistics.median(gaps),
    }


def probe(trainer: Any, loss_of: Any) -> dict[str, float]:
    """Loss and gradient norm on the probe rows before training; raises where nothing would be learnt."""
    model = trainer.model
    model.train()
    loss = loss_of(trainer)
    norm = sum(p.grad.float().pow(2).sum() for p in model.parameters() if p.grad is not None) ** 0.5
    model.zero_grad(set_to_none=True)
    found = {"probe_loss": float(loss), "probe_grad_norm": float(norm)}
    if not found["probe_grad_norm"] > 0:
        raise SystemExit(f"no gradient: {found}")
    return found


def measure(work: Work, arm: Arm, device: str) -> dict[str, Any]:
    """Build the arm's trainer, probe and time it."""
    import torch
    from datasets import Dataset

    if arm.engine == "chatalign":
        from gpu_chatalign import build
    else:
        from gpu_trl import build
    imported = time.perf_counter() - STARTED
    count = int((work.warm + work.steps) * work.rows_a_step * 1.3) + work.batch
    rows, probe_rows = (draw_rows(work, n, seed=seed) for n, seed in ((count, 1), (PROBE_ROWS, 2)))
    with tempfile.TemporaryDirectory() as folder:
        trainer, counted, loss_of, note = build(
            work,
            arm,
            make_model(work, device),
            make_tokenizer(),
            Dataset.from_dict(rows),
            Dataset.from_dict(probe_rows),
            folder=Path(folder),
            device=device,
        )
        synchronize(device)
        built = time.perf_counter() - STARTED
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = probe(trainer, loss_of)
        timed = watch(trainer, work, counted, device)
    speed = timed["items"] / timed["seconds"]
    result = found | timed | {"import_s": imported, "built_s": built, "per_s": speed, "note": note}
    if work.stage == "sft":
        lengths = [len(ids) for ids in rows["input_ids"]]
        per_token = training_flops(SIZES[work.size], lengths, full=work.tuning == "full") / sum(lengths)
        result["model_tflops_per_s"] = per_token * speed / 1e12
    if device == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result | {"versions": {"torch": torch.__version__}}


def ceilings(device: str) -> dict[str, Any]:
    """The best of several matrix products (bf16, TFLOP/s) and of several copies (TB/s read and written)."""
    import torch

    side, count = (8192, 1 << 28) if device == "cuda" else (512, 1 << 22)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(count, device=device, dtype=torch.float32)
    target = torch.empty_like(source)

    def best(work: Any, runs: int) -> float:
        times = []
        for _ in range(5):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(runs):
                work()
            synchronize(device)
            times.append((time.perf_counter() - start) / runs)
        return min(times)

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": name,
        "gemm_tflops": 2 * side**3 / best(lambda: left @ right, 20) / 1e12,
        "copy_tb_per_s": 2 * 4 * count / best(lambda: target.copy_(source), 10) / 1e12,
        "torch": torch.__version__,
    }


def main() -> None:
    """Print the result as the last line of standard output."""
    if sys.argv[1] == "--ceilings":
        print(json.dumps(ceilings(sys.argv[2])))
        return
    spec = json.loads(sys.argv[1])
    print(json.dumps(measure(Work(**spec["work"]), Arm(**spec["arm"]), spec["device"])))


if __name__ == "__main__":
    main()
