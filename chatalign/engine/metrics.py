"""Means of what a stage measures, kept on the device and read once per log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


class MetricSums:
    """Running sums of observations by name: a metric is the mean over all of them, from all micro-batches and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor], *, filler: bool = False) -> None:
        """Take in tensors of observations, any shape; a filler adds the names alone, so that ranks hold the same."""
        for name, values in metrics.items():
            total = values.detach().sum(dtype=torch.float32)
            if filler:
                total = torch.zeros_like(total)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + (0 if filler else values.numel())

    def drain(self, reduce: Reduce) -> dict[str, float]:
        """The means, after summing over ranks with `reduce`; starts anew. Names without observations are left out."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        device = self._sums[names[0]].device
        # fp64 where there is one: counts and sums of long windows pass fp32's 2^24.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.stack([self._sums[name].to(dtype) for name in names])
        counts = torch.tensor([self._counts[name] for name in names], dtype=dtype, device=device)
        totals = reduce(torch.stack((sums, counts))).tolist()
        self._sums, self._counts = {}, {}
        return {name: total / count for name, total, count in zip(names, *totals, strict=True) if count}


class Stopwatch:
    """Seconds of training alone: it is paused while a checkpoint is saved or a model evaluated."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """What has run so far."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def start(self) -> None:
        """Run; does nothing where it runs already."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Stand still; does nothing where it stands."""
        self._before, self._started = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside the context."""
        ran = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if ran:
                self.start()
