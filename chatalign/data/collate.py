"""Rows to the flat layout: one sequence of T tokens, and a table that says which stretch is which document.

T tokens in the batch, S segments, K targets, n pairs. A batch is a plain dict of tensors:

``input_ids``, ``position_ids``  [1, T] int64
``segments``           [S, 4] int32: (start, end, prefix_start, prefix_end). Tokens start..end attend causally to
                       themselves and fully to prefix_start..prefix_end (0, 0 where there is no prefix).
``predict_positions``  [K] int64: the places whose hidden state predicts …
``targets``            [K] int64: … these tokens. The first token of chosen and of rejected are both predicted at
                       the prompt's last token, so that place occurs twice.
``sequence_index``     [K] int64: the sequence that each target belongs to.
``num_sequences``      [] int64.
``pool_positions``     [2n] int64, pairs only: the last token of each sequence, where a reward model reads its score.

A document is one segment. A pair is three, ``prompt | chosen | rejected``: chosen and rejected have the prompt as
prefix and positions that go on from the prompt's end, so that the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]


def collate_lm(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Documents with columns ``input_ids`` and ``supervised``, each one segment and one sequence.

    The first token of a document is never a target: nothing before it predicts it.
    Raises ValueError where a document is empty.
    """
    documents = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
    supervised = [np.array(row["supervised"], dtype=bool) for row in rows]
    for mask, ids in zip(supervised, documents, strict=True):
        if len(mask) != len(ids) or not len(ids):
            raise ValueError(f"a document has {len(ids)} tokens and {len(mask)} marks; both must be equal, above 0")
        mask[:1] = False
    return _documents(documents, supervised)


def collate_sequences(prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]) -> Batch:
    """Documents of prompt and response; the response's tokens are the targets (PPO).

    Raises ValueError where a prompt is empty: the first token of its response would have no predictor.
    """
    documents, supervised = [], []
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        if not len(prompt):
            raise ValueError("a prompt is empty; give it at least one token")
        documents.append(np.asarray([*prompt, *response], dtype=np.int64))
        mask = np.zeros(len(prompt) + len(response), dtype=bool)
        mask[len(prompt) :] = True
        supervised.append(mask)
    return _documents(documents, supervised)


def collate_pairs(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Pairs with columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids``: sequence 2i is chosen i, 2i+1 rejected i.

    Raises ValueError where one of the three is empty.
    """
    pieces: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[tuple[int, int, int, int]] = []
    predict: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    pool: list[int] = []
    at = 0
    for row in rows:
        prompt, chosen, rejected = (
            np.asarray(row[name], dtype=np.int64) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        if not (len(prompt) and len(chosen) and len(rejected)):
            raise ValueError("a pair has an empty prompt, chosen or rejected side; each needs at least one token")
        prompt_start, prompt_end = at, at + len(prompt)
        segments.append((prompt_start, prompt_end, 0, 0))
        pieces.append(prompt)
        positions.append(np.arange(len(prompt)))
        at = prompt_end
        for side in (chosen, rejected):
            segments.append((at, at + len(side), prompt_start, prompt_end))
            pieces.append(side)
            positions.append(np.arange(len(prompt), len(prompt) + len(side)))
            predictors = np.arange(at - 1, at + len(side) - 1)
            predictors[0] = prompt_end - 1
            predict.append(predictors)
            targets.append(side)
            at += len(side)
            pool.append(at - 1)
    sequence_index = np.repeat(np.arange(len(targets)), [len(side) for side in targets])
    batch = _batch(pieces, positions, segments, predict, targets, sequence_index, num_sequences=2 * len(rows))
    batch["pool_positions"] = torch.tensor(pool, dtype=torch.int64)
    return batch


def _documents(documents: list[np.ndarray], supervised: list[np.ndarray]) -> Batch:
    lengths = [len(ids) for ids in documents]
    starts = np.cumsum([0, *lengths])
    segments = [(a, b, 0, 0) for a, b in pairwise(starts.tolist())]
    places = [np.flatnonzero(mask) for mask in supervised]
    predict = [place + start - 1 for place, start in zip(places, starts[:-1], strict=True)]
    targets = [ids[place] for ids, place in zip(documents, places, strict=True)]
    sequence_index = np.repeat(np.arange(len(documents)), [len(place) for place in places])
    positions = [np.arange(length) for length in lengths]
    return _batch(documents, positions, segments, predict, targets, sequence_index, num_sequences=len(documents))


def _batch(
    pieces: list[np.ndarray],
    positions: list[np.ndarray],
    segments: list[tuple[int, int, int, int]],
    predict: list[np.ndarray],
    targets: list[np.ndarray],
    sequence_index: np.ndarray,
    *,
    num_sequences: int,
) -> Batch:
    if not pieces:
        raise ValueError("a batch needs at least one row")
    return {
        "input_ids": torch.from_numpy(np.concatenate(pieces))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
        "segments": torch.tensor(segments, dtype=torch.int32).reshape(-1, 4),
        "predict_positions": torch.from_numpy(np.concatenate(predict).astype(np.int64)),
        "targets": torch.from_numpy(np.concatenate(targets)),
        "sequence_index": torch.from_numpy(sequence_index.astype(np.int64)),
        "num_sequences": torch.tensor(num_sequences, dtype=torch.int64),
    }


def pad_to_multiple(batch: Batch, multiple: int) -> Batch:
    """The batch with T a multiple of `multiple`: token 0 is appended as segments of their own, which are no targets.

    For hardware whose kernels are made for each new T: then there are few. No added segment is longer than the
    batch's longest, so that sliding windows and position tables that hold the rows hold the padding too.
    """
    length = batch["input_ids"].shape[1]
    extra = -length % multiple
    if not extra:
        return batch
    segments = batch["segments"]
    longest = int((segments[:, 1] - segments[:, 0]).max())
    own = [(start, min(start + longest, length + extra), 0, 0) for start in range(length, length + extra, longest)]
    return batch | {
        "input_ids": torch.cat((batch["input_ids"], batch["input_ids"].new_zeros(1, extra)), dim=1),
        "position_ids": torch.cat((batch["position_ids"], torch.arange(extra).unsqueeze(0) % longest), dim=1),
        "segments": torch.cat((segments, torch.tensor(own, dtype=segments.dtype))),
    }
