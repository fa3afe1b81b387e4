"""What training on a CPU leaves free in the heap goes back to the system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatalign.engine import heap, trainer

from .stand_ins import lm_rows, make_trainer

HAS_GLIBC = heap._glibc() is not None


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not HAS_GLIBC, reason="another C library")
def test_gaps_between_blocks_are_given_back() -> None:
    kept, dropped = [], []
    for _ in range(6000):  # small blocks keep the large ones between them from being one
        dropped.append(torch.ones(20_000))
        kept.append(torch.ones(100))
    dropped.clear()
    before, free = resident(), heap.free_bytes()
    assert free > 400 * 2**20
    assert heap.give_back_free_pages()
    assert resident() < before - 300 * 2**20
    assert all(block.sum() == 100 for block in kept)


def test_where_there_is_no_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "win32")
    monkeypatch.setattr(heap.ctypes, "CDLL", None)  # as good as there: to call it raises
    monkeypatch.setattr(heap, "_glibc", heap._glibc.__wrapped__)
    assert heap.free_bytes() == 0
    assert not heap.give_back_free_pages()


@pytest.mark.parametrize("free", [0, heap._WORTH_IT - 1])
def test_a_little_is_kept_for_the_next_step(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "free_bytes", lambda: free)
    assert not heap.give_back_free_pages()


def test_every_micro_batch_is_followed_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(trainer, "give_back_free_pages", lambda: calls.append(1))
    made = make_trainer(tmp_path, lm_rows(8), max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    made.train()
    assert len(calls) == 4
