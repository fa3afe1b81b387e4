"""Which rows a run has trained on, so that one that goes on from a checkpoint sees the rest and nothing twice.

The order is a function of seed and epoch (see `BinSampler`). It is walked beside the loader: every micro-batch must
be the one that comes next, and a checkpoint keeps a hash of all that went before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatalign.artifact import fingerprint
from chatalign.engine.batching import Bins, BinSampler
from chatalign.errors import CheckpointError


class SeenRows:
    """The bins that all processes have been given, in their order; `place` is what errors name."""

    def __init__(self, dataset: Bins, sampler: BinSampler, place: str) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.place = place
        self.count = 0  # of bins
        self._last = 0
        self._order = hashlib.sha256()
        self._stretches = self._walk()

    def _walk(self) -> Iterator[list[int]]:
        epoch = 0
        while True:
            self.sampler.set_epoch(epoch)
            yield from self.sampler.stretches()
            epoch += 1

    def _next(self) -> list[int]:
        stretch = next(self._stretches)
        self._order.update(",".join(map(str, stretch)).encode() + b",")
        self.count, self._last = self.count + len(stretch), stretch[-1]
        return stretch

    def add(self, bins: Sequence[int]) -> None:
        """This process's next micro-batch; raises CheckpointError where it isn't the one that comes next."""
        before = self.count
        expected = self.sampler.own(self._next())
        if list(bins) != expected:
            raise other_rows(self.place, f"after {before} bins came {list(bins)} and not {expected}")

    def state_dict(self) -> dict[str, Any]:
        """How many bins, a hash of their order, and one of the last bin's rows; the same on every process."""
        return {"bins": self.count, "order": self._order.hexdigest(), "last": self._content()}

    def go_on_from(self, state: Mapping[str, Any] | None) -> None:
        """Walk on to `state_dict`; raises CheckpointError where that is another order or other rows, or missing."""
        if state is None:
            raise other_rows(self.place, "it doesn't say which it has seen")
        while self.count < state["bins"]:
            self._next()
        if self.count != state["bins"] or self._order.hexdigest() != state["order"]:
            raise other_rows(self.place, f"the first {state['bins']} bins were in another order")
        if self.count and self._content() != state["last"]:
            raise other_rows(self.place, f"bin {self._last} held other tokens")

    def _content(self) -> str:
        return fingerprint([dict(row) for row in self.dataset[self._last].rows])


def other_rows(place: str, how: str) -> CheckpointError:
    """The error for a run that would go on in `place` with rows that it has seen, or without some that it hasn't."""
    return CheckpointError(
        f"{place}: the rows that follow are not those that the run has yet to see ({how}); go on with the processes, "
        f"batch size and library versions that it began with, or give another output_dir"
    )
