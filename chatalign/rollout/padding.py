"""Whether left padding counts: a model whose positions the padding moves computes other replies than without it.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chatalign.errors import GuardError
from chatalign.maths import kl_exact
from chatalign.rollout.decoding import Decoding
from chatalign.rollout.transformers_engine import TransformersRollout, evaluation_mode

# KL of the next token in nats: rounding gives far less, positions that are off by one far more.
_LARGEST = {"full": 1e-3, "half": 2e-2}


def refuse_padding_that_counts(
    engine: TransformersRollout, prompt_ids: Sequence[Sequence[int]], *, full_precision: bool
) -> None:
    """Raise GuardError where the shortest prompt is answered otherwise beside the longest than alone.

    Two tokens are looked at, one read with the prompt and one fed after it. Nothing is known of prompts of one length.
    """
    shortest, longest = min(prompt_ids, key=len), max(prompt_ids, key=len)
    if len(shortest) == len(longest):
        return
    with evaluation_mode(engine.model):
        alone_2V = _two_steps(engine, [shortest])
        beside_2V = _two_steps(engine, [shortest, longest])
    gap = float(kl_exact(alone_2V, beside_2V).max())
    if not gap <= _LARGEST["full" if full_precision else "half"]:
        padding = len(longest) - len(shortest)
        raise GuardError(
            f"a prompt of {len(shortest)} tokens is answered otherwise with {padding} tokens of padding on its left "
            f"than alone (KL {gap:.2g} nats): its positions move; install the transformers of constraints.txt, or take "
            f"another model"
        )


def _two_steps(engine: TransformersRollout, prompts: list[Sequence[int]]) -> Tensor:
    """Logits of the first prompt's next token, and of the one after token 0 of the vocabulary, (2, V)."""
    decoding = Decoding(engine.model, prompts, engine.pad_token_id)
    read_BV = decoding.prefill()
    fed_BV = decoding.step(torch.zeros(len(prompts), dtype=torch.long, device=read_BV.device))
    return torch.stack((read_BV[0], fed_BV[0])).float()
