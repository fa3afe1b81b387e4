"""No pass of PPO builds [tokens, vocabulary]: the largest tensor and the memory in use, at 4k, 16k and 64k tokens."""

from __future__ import annotations

import ctypes
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start
from tiny import make_llama, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chatalign.data.collate import collate_sequences
from chatalign.engine import loss_head
from chatalign.engine.isolation import enable_segments
from chatalign.engine.loss_head import _CHUNK_BYTES, _PLAIN_LOGITS_BYTES
from chatalign.engine.ppo_model import PpoModel, ValueHead

from .conftest import Make, built

REPLIES, LENGTH, WIDTH = 16, 64, 16
TOKENS = REPLIES * LENGTH
M_MMAP_THRESHOLD = -3  # of malloc.h


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made, weights' own shapes and gradients excepted."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights, self.elements, self.shape = weights, 0, ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self.weights:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                own = min(size, tensor.numel())  # a view of a weight is no memory of its own
                if own > self.elements:
                    self.elements, self.shape = own, tuple(tensor.shape)
        return out


def trainer_with(vocabulary: int, make_recipe: Make, folder: Path, **ppo: Any) -> Any:
    """A one-layer model of `vocabulary` tokens behind the tiny tokenizer, which knows the first few hundred."""
    tokenizer = make_tokenizer()
    model = make_llama(
        vocabulary, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_key_value_heads=4
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    over = {
        "model": {"name_or_path": str(folder)},
        "ppo": {
            "total_episodes": REPLIES,
            "rollout_batch_size": REPLIES,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
            "response_length": LENGTH,
            "local_rollout_forward_batch_size": REPLIES,
            "entropy_coef": 0.01,
            **ppo,
        },
        "train": {"per_device_train_batch_size": REPLIES},
    }
    return built(make_recipe(f"run{vocabulary}", over), stop_ids=[])


def largest(trainer: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The largest tensor of the rollout, of scoring and of an update, in elements and as a shape."""
    weights = {shape for p in trainer.model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    collector = trainer.play.collector
    rows = [trainer.prompt_rows[row % len(trainer.prompt_rows)] for row in range(REPLIES)]
    prompts = [list(row["prompt_ids"]) for row in rows]
    found = {}
    with Largest(weights) as watch:
        rollout = collector.engine.generate(prompts, trainer.play.sampling)
    found["rollout"] = watch.elements, watch.shape
    assert sum(map(len, rollout.response_ids)) == TOKENS
    with Largest(weights) as watch:
        collector._measure(prompts, rollout.response_ids, logps=True)
    found["scoring"] = watch.elements, watch.shape
    batch = collate_sequences(prompts, rollout.response_ids)
    with Largest(weights) as watch:
        out = trainer.model(batch)
        (out.logps.sum() + out.values.sum() + out.entropy.sum()).backward()
    found["update"] = watch.elements, watch.shape
    return found


@pytest.mark.parametrize("vocabulary", [4096, 16384, 65536])
def test_no_tensor_of_all_tokens_times_the_vocabulary(make_recipe: Make, tmp_path: Path, vocabulary: int) -> None:
    found = largest(trainer_with(vocabulary, make_recipe, tmp_path / "model"))
    chunk = max(64 * vocabulary, _CHUNK_BYTES["cpu"] // 4)  # elements of fp32
    assert 2 * chunk <= TOKENS * vocabulary
    assert found["rollout"][0] <= REPLIES * vocabulary, "one position's logits"
    assert found["scoring"][0] <= chunk, found["scoring"][1]
    assert found["update"][0] <= chunk, found["update"][1]


def test_the_watch_sees_a_plain_head(make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same passes with the plain head: what the test above would catch."""
    monkeypatch.setattr(loss_head, "_chunk_tokens", lambda *_: 0)
    found = largest(trainer_with(4096, make_recipe, tmp_path / "model"))
    assert found["scoring"][0] >= TOKENS * 4096
    assert found["update"][0] >= TOKENS * 4096


@pytest.mark.parametrize(("vocabulary", "tokens"), [(512, 4096), (4096, 512), (65536, 32)])
def test_small_logits_take_the_plain_path(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int, tokens: int
) -> None:
    """Up to `_PLAIN_LOGITS_BYTES` of logits the plain head is as fast and small; one token more takes the other."""
    assert vocabulary * tokens * 4 == _PLAIN_LOGITS_BYTES
    trainer = trainer_with(vocabulary, make_recipe, tmp_path / "model")
    chosen: list[int] = []
    choose = loss_head._chunk_tokens

    def noted(model: Any, targets: Any) -> int:
        chosen.append(choose(model, targets))
        return chosen[-1]

    monkeypatch.setattr(loss_head, "_chunk_tokens", noted)
    results = []
    for count in (tokens, tokens + 1):
        ids = [5 + place % 7 for place in range(64)]
        rows, rest = divmod(count, 32)
        replies = [ids[:32]] * rows + ([ids[:rest]] if rest else [])
        with torch.no_grad():
            results.append(trainer.model(collate_sequences([[5]] * len(replies), replies)).logps[:tokens])
    plain, chunked = chosen[0], chosen[1]
    assert plain == 0
    assert chunked == max(64, _CHUNK_BYTES["cpu"] // (4 * vocabulary))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def measure(vocabulary: int, head: str, most: int, found: Path) -> None:
    """Write this process's peak memory after an update of 256 tokens and after one of `most`, in bytes."""
    # A fixed threshold: glibc would raise it after the first large block that is freed, and keep what follows.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    model = make_llama(vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_key_value_heads=4)
    enable_segments(model)
    if head == "chunked":
        assert loss_head.enable_chunked_head(model)
    ppo = PpoModel(model, ValueHead(16), temperature=1.0, entropy_grad=True)
    peaks = []
    for tokens in (256, most):
        out = ppo(collate_sequences([[5]] * (tokens // 64), [[6] * 64] * (tokens // 64)))
        (out.logps.sum() + out.entropy.sum() + out.values.sum()).backward()
        peaks.append(peak())
    found.write_text(json.dumps(peaks))


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux's /proc")
def test_peak_memory_does_not_grow_with_tokens_times_the_vocabulary(tmp_path: Path) -> None:
    vocabulary, tokens = 32768, 1024
    logits = (tokens - 256) * vocabulary * 4

    def growth(head: str) -> int:
        process = start(measure, vocabulary, head, tokens, tmp_path / head, printed=tmp_path / "printed.txt")
        process.join()
        assert process.exitcode == 0, (tmp_path / "printed.txt").read_text("utf-8")
        before, after = json.loads((tmp_path / head).read_text())
        return int(after - before)

    assert growth("chunked") < 0.25 * logits
    assert growth("plain") > 1.5 * logits, "the plain head holds them, and their gradient"
    assert math.isclose(logits, 96 * 2**20)
