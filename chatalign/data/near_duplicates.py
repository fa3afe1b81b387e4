"""Rows that are nearly the same: MinHash finds the pairs to look at, the exact Jaccard of their n-grams decides.

Source: Broder (1997), "On the resemblance and containment of documents"; Lee et al. (2022), arXiv 2107.06499, drop
near-duplicates of training data in this way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chatalign.data.ngrams import NO_HASHES, Hashes, contained
from chatalign.errors import DependencyError

if TYPE_CHECKING:
    from datasketch import MinHash

NGRAM = 5  # words, as in Lee et al.
_PERMUTATIONS = 128
_SEED = 1  # of datasketch's permutations
_FOUND = 0.999  # the least probability that a pair at the threshold is looked at
_BASE = np.uint64(0x9E3779B97F4A7C15)


def banding(threshold: float) -> tuple[int, int]:
    """Bands, and values in each: rows that share all values of a band are looked at.

    The longest bands by which a pair of Jaccard s ≥ `threshold` is looked at with probability
    1 − (1 − s^values)^bands ≥ 0.999.
    """
    for values in range(_PERMUTATIONS, 1, -1):
        bands = _PERMUTATIONS // values
        if 1 - (1 - threshold**values) ** bands >= _FOUND:
            return bands, values
    return _PERMUTATIONS, 1


def minhash() -> type[MinHash]:
    """datasketch's MinHash, imported here since that takes most of a second. Raises DependencyError."""
    try:
        from datasketch import MinHash
    except ImportError:
        mend = "`data.clean.near_duplicates` needs datasketch; pip install 'chatalign[clean]'"
        raise DependencyError(mend) from None
    return MinHash


def band_hashes(shingles: Iterable[Hashes], threshold: float) -> Hashes:
    """A 64-bit hash of each band of each row's MinHash, shape (rows, bands); `shingles` are a row's n-grams each."""
    bands, values = banding(threshold)
    inputs = ((row >> np.uint64(32)).tolist() for row in shingles)
    made = minhash().generator(inputs, num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=int)
    minima = np.array([one.hashvalues[: bands * values] for one in made], np.uint64).reshape(-1, bands, values)
    hashes = np.zeros(minima.shape[:2], np.uint64)
    for value in range(values):
        hashes = hashes * _BASE + minima[:, :, value]
    return hashes


def later_copies(
    rows: NDArray[np.int64], bands: Hashes, parts: Sequence[Sequence[Hashes]], threshold: float
) -> list[int]:
    """Those of `rows`, in order, that are nearly an earlier one which stays; so of each such row one stays, the first.

    `bands` has shape (all rows, bands); ``parts[p][row]`` are the sorted n-grams of a part of a row, such as its
    prompt or a reply. Rows are near-duplicates where the Jaccard of each part reaches `threshold`. A pair at the
    threshold is looked at with probability 0.999, a more similar one more surely; one with the same n-grams always.
    """
    alike = _rows_alike(rows, bands)
    stay: dict[int, list[int]] = defaultdict(list)  # rows that stay, by the bands that others have too
    copies: list[int] = []
    for place in np.flatnonzero((alike >= 0).any(axis=1)).tolist():
        row, mine = int(rows[place]), alike[place][alike[place] >= 0].tolist()
        others = sorted({other for band in mine for other in stay[band]})
        for part in reversed(parts):  # replies first: prompts of one template are alike, and their replies aren't
            others = [other for other, near in zip(others, _near(part, row, others, threshold), strict=True) if near]
        if others:
            copies.append(row)
        else:
            for band in mine:
                stay[band].append(row)
    return copies


def _rows_alike(rows: NDArray[np.int64], bands: Hashes) -> NDArray[np.int32]:
    """Each band's hashes as small numbers that no other band has; -1 where a row is alone with one."""
    alike = np.empty((len(rows), bands.shape[1]), np.int32)
    first = 0
    for band in range(bands.shape[1]):
        _, numbers, counts = np.unique(bands[rows, band], return_inverse=True, return_counts=True)
        shared = counts > 1
        alike[:, band] = np.where(shared, np.cumsum(shared) - 1 + first, -1)[numbers]
        first += int(shared.sum())
    return alike


def _near(part: Sequence[Hashes], row: int, others: list[int], threshold: float) -> NDArray[np.bool_]:
    """Which of `others` reach the threshold with `row` in one part. Two empty parts are the same."""
    mine, theirs = part[row], [part[other] for other in others]
    sizes = np.fromiter(map(len, theirs), np.int64, len(theirs))
    shared = contained(np.concatenate([*theirs, NO_HASHES]), mine)
    both = np.bincount(np.repeat(np.arange(len(theirs)), sizes), weights=shared, minlength=len(theirs))
    either = len(mine) + sizes - both
    return np.divide(both, either, out=np.ones(len(theirs)), where=either > 0) >= threshold
