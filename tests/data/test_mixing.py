"""An epoch's meaning: shares within half a row, whole passes, seeded, and the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from chat_families import BY_NAME, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from chatalign.data import prepare
from chatalign.data.mixing import Side, mixture, side_of
from chatalign.recipe import DataSection

SOURCES = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SOURCES, st.integers(0, 3))
def test_an_epoch_has_each_sources_share_in_whole_passes(sources: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = zip(*sources, strict=True)
    drawn = mixture(sizes, weights, seed=seed)
    counts = Counter(drawn)
    for source, (size, weight) in enumerate(sources):
        times = [counts[source, row] for row in range(size)]
        assert abs(sum(times) - sum(sizes) * weight / sum(weights)) <= 0.5 + 1e-9
        assert max(times) - min(times) <= 1  # whole passes, and a choice of the rest
    assert set(counts) <= {(source, row) for source, size in enumerate(sizes) for row in range(size)}
    assert abs(len(drawn) - sum(sizes)) <= len(sizes) / 2
    assert drawn == mixture(sizes, weights, seed=seed)
    assert drawn == mixture(sizes, [weight * 2 for weight in weights], seed=seed)  # only their proportions count


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 3))
def test_without_weights_every_row_comes_once_in_order(sizes: list[int], seed: int) -> None:
    expected = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    assert mixture(sizes, [None] * len(sizes), seed=seed) == expected


def test_an_epoch_by_hand() -> None:
    """Sources of 6 and 2 rows, weights 1 and 3: eight rows, 2 and 6 of them; the small source in three passes."""
    counts = Counter(mixture([6, 2], [1.0, 3.0], seed=0))
    assert sorted(times for (source, _), times in counts.items() if source == 0) == [1, 1]
    assert [counts[1, 0], counts[1, 1]] == [3, 3]


def test_a_weighted_source_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="source 1 has a weight and no rows"):
        mixture([3, 0], [1.0, 1.0], seed=0)


def test_another_seed_draws_other_rows_in_the_same_shares() -> None:
    epochs = [mixture([50, 50], [1.0, 3.0], seed=seed) for seed in range(4)]
    assert {Counter(source for source, _ in epoch)[0] for epoch in epochs} == {25}
    assert len({frozenset(row for source, row in epoch if source == 0) for epoch in epochs}) == 4


def test_the_side_of_a_row() -> None:
    sides = [side_of(digest, eval_fraction=0.5, asked={"9" * 64}) for digest in ("0" * 64, "9" * 64, "f" * 64, "")]
    assert sides == [Side.EVAL, Side.NEITHER, Side.TRAIN, Side.TRAIN]


TWO_RANKS = """
import hashlib, json, sys
from chatalign.data.mixing import mixture, prompt_hash
from chatalign.data.ngrams import ngrams, words
from chatalign.data.rows import Text

texts = [f"row {i} 你好 and {'more ' * (i % 3)}words" for i in range(60)]
print(json.dumps([
    mixture([60, 7], [2.0, 1.0], seed=5),
    [prompt_hash(Text(text=text)) for text in texts],
    [ngrams(words(text), 3).tolist() for text in texts],
]))
"""


def test_ranks_agree_whatever_pythons_hash_seed() -> None:
    """Each rank is a process with a hash seed of its own; nothing here may depend on the order of a set."""
    views = []
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", TWO_RANKS], env=environment, capture_output=True, text=True, check=True
        )
        views.append(json.loads(done.stdout))
    assert views[0] == views[1]


def test_two_ranks_see_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by the tokens that the other has written, one on a machine of its own: rows, order, sides and counts."""
    paths = []
    for name, count in (("many", 40), ("few", 6)):
        rows = [{"prompt": f"{name} {i % 35}", "completion": f"reply {i % 35}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": 1.0})
    section = DataSection(datasets=paths, eval_fraction=0.2, clean={})
    views = []
    for home, count in (("one", None), ("one", 2), ("two", 3)):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / home)
        own = section.model_copy(update={"num_proc": count})
        made = prepare(own, tokenizer_of(BY_NAME["chatml"]), "conversation", seed=3)
        assert made.eval is not None
        views.append((made.train[:], made.eval[:], made.used))
    assert views[0] == views[1] == views[2]
    assert [account.dropped for account in made.used] == [{"duplicate of an earlier row": 5}, {}]
