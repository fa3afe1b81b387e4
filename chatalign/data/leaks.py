"""The split, looked at from behind: which prompts were written on which side, whatever decided that."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from chatalign.data.mixing import Side
from chatalign.errors import GuardError


class PromptsWritten:
    """The prompts of the rows that train and of those that evaluate, as the first 8 bytes of each one's hash."""

    def __init__(self) -> None:
        self._prompts = {Side.TRAIN: array("Q"), Side.EVAL: array("Q")}

    def add(self, hashes: Sequence[str], sides: Sequence[Side], written: Sequence[bool]) -> None:
        """Note the rows of a chunk that were written; a row without a hash is on no side of a split."""
        for digest, side, is_written in zip(hashes, sides, written, strict=True):
            if digest and is_written and side in self._prompts:
                self._prompts[side].append(int(digest[:16], 16))

    def refuse_both_sides(self, paths: str) -> None:
        """Raise GuardError where a prompt is both trained on and evaluated on: its evaluation would be memory."""
        train, held_out = (np.unique(np.frombuffer(prompts, np.uint64)) for prompts in self._prompts.values())
        both = np.intersect1d(train, held_out, assume_unique=True)
        if len(both):
            raise GuardError(
                f"{paths}: {len(both)} of {len(held_out)} prompts to evaluate on are trained on too, so that the split "
                f"goes by more than the prompt; give rows to evaluate on as data.eval_datasets, and report this"
            )
