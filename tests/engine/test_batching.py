"""Every row once an epoch over all processes, the same work a step however many there are, and means over ranks."""

from __future__ import annotations

import pytest
import torch

from chatalign.data.collate import collate_lm
from chatalign.engine.batching import Bins, BinSampler, CollateItems, make_bins, row_lengths
from chatalign.engine.metrics import MetricSums, Stopwatch

from .stand_ins import lm_rows, pair_rows


@pytest.mark.parametrize(("bins", "world_size", "batch_size"), [(7, 2, 2), (8, 2, 2), (1, 3, 1), (10, 4, 2), (5, 1, 3)])
def test_processes_share_an_epoch(bins: int, world_size: int, batch_size: int) -> None:
    samplers = [
        BinSampler(bins, batch_size=batch_size, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert {len(mine) for mine in batches} == {len(samplers[0])}  # nobody waits for ever
    seen = [index for mine in batches for batch in mine for index in batch]
    assert sorted(index for index in seen if index >= 0) == list(range(bins))
    alone = list(BinSampler(bins, batch_size=batch_size * world_size, seed=3))
    for step, together in enumerate(zip(*batches, strict=True)):
        assert sorted(i for batch in together for i in batch if i >= 0) == sorted(alone[step])


def test_a_filler_is_a_bin_that_is_marked() -> None:
    bins = Bins(lm_rows(3), [[0, 2], [1]])
    batch = CollateItems(collate_lm)([bins[-1]])
    assert batch["filler"] is True
    assert batch["input_ids"][0].tolist() == bins.rows[0]["input_ids"] + bins.rows[2]["input_ids"]
    assert CollateItems(collate_lm)([bins[1]])["filler"] is False


def test_bins_hold_no_more_than_their_capacity() -> None:
    rows = lm_rows(30)
    lengths = row_lengths(rows)
    assert lengths == [len(ids) for ids in rows["input_ids"]]
    bins = make_bins(rows, lengths, 40)
    assert all(sum(lengths[i] for i in bin_) <= 40 for bin_ in bins.bins)
    assert sorted(i for bin_ in bins.bins for i in bin_) == list(range(30))
    assert [len(bin_) for bin_ in make_bins(rows, lengths, None).bins] == [1] * 30


def test_a_pair_is_as_long_as_its_three_parts() -> None:
    rows = pair_rows(3)
    expected = [len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows]
    assert row_lengths(rows) == expected


def test_metrics_are_means_over_observations() -> None:
    sums = MetricSums()
    sums.add({"accuracy": torch.tensor([1.0, 0.0]), "loss": torch.tensor(3.0)})
    sums.add({"accuracy": torch.tensor([1.0]), "loss": torch.tensor(1.0)})
    sums.add({"accuracy": torch.tensor([0.0, 0.0])}, filler=True)
    assert sums.drain(lambda totals: totals) == pytest.approx({"accuracy": 2 / 3, "loss": 2.0})
    assert sums.drain(lambda totals: totals) == {}
    sums.add({"empty": torch.zeros(0)})
    assert sums.drain(lambda totals: totals) == {}


def test_a_paused_watch_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("chatalign.engine.metrics.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    watch.start()  # at 10
    with watch.paused():  # at 13; goes on at 20
        pass
    assert watch.seconds == 4.0  # at 21
