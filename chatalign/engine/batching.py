"""From prepared rows to this process's batches: bins of rows, shuffled by epoch, the same for every launch.

A *bin* is a list of rows that share a flat row of tokens: several under packing, else one. A micro-batch is
``per_device_train_batch_size`` bins laid end to end, without padding. The order depends on seed and epoch alone;
with W processes, micro-batch m of an epoch is the m-th stretch of W × batch bins, bin r, r + W, … going to process
r, so that two processes see in a step what one sees with twice the batch. Where a stretch is short, a process
without a bin runs a *filler*, a bin again with weight 0: nothing is trained or counted twice, and nobody hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow
import pyarrow.compute
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from chatalign.data.collate import pad_to_multiple
from chatalign.data.packing import best_fit_decreasing
from chatalign.engine.signals import in_own_group

Row = Mapping[str, Any]
Batch = dict[str, Any]
Collate = Callable[[Sequence[Row]], Batch]

# On the host: read by the attention's plan, or by Python.
HOST_KEYS = frozenset({"segments", "num_sequences", "num_tokens", "filler"})


@dataclass(frozen=True)
class Item:
    """A bin's rows, its index, and whether it is a filler."""

    rows: list[Row]
    filler: bool
    index: int


class Bins(Dataset[Item]):
    """Rows by bin. An index below 0 means the filler of bin ``-index - 1``."""

    def __init__(self, rows: Any, bins: Sequence[Sequence[int]]) -> None:
        self.rows = rows
        self.bins = [list(bin_) for bin_ in bins]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Item:
        filler = index < 0
        chosen = self.bins[-index - 1 if filler else index]
        columns = self.rows[chosen]  # datasets.Dataset gives columns for a list of indices
        return Item([{name: values[i] for name, values in columns.items()} for i in range(len(chosen))], filler, index)


def make_bins(rows: Any, lengths: Sequence[int], capacity: int | None) -> Bins:
    """Rows packed to `capacity` tokens, or one row a bin where it is None; rows longer than it get their own bin."""
    if capacity is None:
        return Bins(rows, [[i] for i in range(len(lengths))])
    capacity = max(capacity, max(lengths, default=1))
    return Bins(rows, best_fit_decreasing(lengths, capacity))


def row_lengths(rows: Any) -> list[int]:
    """Tokens that each prepared row takes in the flat layout. Read from the columns' offsets, not from the tokens."""
    columns = [name for name in rows.column_names if name.endswith("_ids")]
    lengths: list[int] = []
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        lengths += sum(pyarrow.compute.list_value_length(table[name]).to_numpy() for name in columns).tolist()
    return lengths


class BinSampler(Sampler[list[int]]):
    """This process's micro-batches of bin indices; negative indices are fillers."""

    def __init__(self, bins: int, *, batch_size: int, seed: int | None, rank: int = 0, world_size: int = 1) -> None:
        self.bins, self.batch_size, self.seed = bins, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.bins // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for stretch in self.stretches():
            yield self.own(stretch)

    def own(self, stretch: list[int]) -> list[int]:
        """This process's bins of a stretch, or a filler."""
        return stretch[self.rank :: self.world_size] or [-stretch[0] - 1]

    def stretches(self) -> Iterator[list[int]]:
        """What all processes together are given of this epoch, micro-batch by micro-batch."""
        if self.seed is None:
            order = list(range(self.bins))
        else:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.bins, generator=generator).tolist()
        size = self.batch_size * self.world_size
        for start in range(0, self.bins, size):
            yield order[start : start + size]


class BinLoader(DataLoader[Item]):
    """A DataLoader whose epoch the trainer can set."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the sampler."""
        sampler = self.batch_sampler
        assert isinstance(sampler, BinSampler)
        sampler.set_epoch(epoch)


@dataclass(frozen=True)
class CollateItems:
    """Items to one flat batch of a multiple of `multiple` tokens, and beside it ``filler``, ``num_tokens``, ``bins``.

    ``num_tokens`` are the rows' own, without padding, ``bins`` the items' indices. A class, so that workers can
    unpickle it.
    """

    collate: Collate
    multiple: int = 1

    def __call__(self, items: Sequence[Item]) -> Batch:
        rows = self.collate([row for item in items for row in item.rows])
        padded: Batch = dict(pad_to_multiple(rows, self.multiple))
        padded["filler"], padded["num_tokens"] = items[0].filler, rows["input_ids"].numel()
        padded["bins"] = [item.index for item in items]
        return padded


def make_loader(
    bins: Bins, collate: Collate, *, batch_size: int, seed: int | None, args: TrainingArguments, multiple: int = 1
) -> BinLoader:
    """This process's micro-batches of `bins`, shuffled by `seed` and epoch, or in their order where it is None.

    Each is padded to a multiple of `multiple` tokens.
    """
    sampler = BinSampler(
        len(bins), batch_size=batch_size, seed=seed, rank=args.process_index, world_size=args.world_size
    )
    return BinLoader(
        bins,
        batch_sampler=sampler,
        collate_fn=CollateItems(collate, multiple),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.device.type == "cuda",
        worker_init_fn=partial(in_own_group, None),
    )


def count_tokens(batch: Batch) -> int:
    """The rows' own tokens of a micro-batch, without what it was padded with."""
    return int(batch.get("num_tokens", batch["input_ids"].numel()))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`, except those that the host reads."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name not in HOST_KEYS else value
        for name, value in batch.items()
    }
