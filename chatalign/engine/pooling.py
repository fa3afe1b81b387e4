"""The start-up check of where a reward model's score is read: at a reply's last token, however it is padded.

We read it there by place; whoever serves the model has transformers find the last token that isn't padding, which is
another one where the padding token also ends replies (row 37 of docs/guard.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chatalign.data.collate import collate_pairs
from chatalign.engine.batching import to_device
from chatalign.engine.isolation import computes_in_half, unwrapped
from chatalign.errors import GuardError
from chatalign.models.heads import scores_at

_TOLERANCE = {"full": 1e-3, "half": 0.25}  # of 1 + |score|


def check_pooling(model: nn.Module, stop_token_id: int) -> None:
    """Compare the score of a tiny reply in our layout, alone, padded left and padded right; raise GuardError.

    Under the caller's autocast. Weights that are not here to run (sharded, on the meta device) are not checked.
    """
    base = unwrapped(model)
    if any(p.is_meta or hasattr(p, "ds_id") for p in base.parameters()):
        return
    prompt, chosen, rejected = _tiny_replies(base, stop_token_id)
    training = model.training
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # else layers were compiled for these few shapes
        device = base.get_input_embeddings().weight.device
        pair = collate_pairs([{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}])
        scores = {"in a row of several replies": scores_at(model, to_device(dict(pair), device)).float().cpu()}
        sequences = [prompt + chosen, prompt + rejected]
        alone = torch.cat([_pooled(model, [ids], "right") for ids in sequences])
        scores |= {f"padded {side}": _pooled(model, sequences, side) for side in ("left", "right")}
    model.train(training)
    allowed = _TOLERANCE["half" if computes_in_half(model) else "full"] * (1 + alone.abs())
    for how, found in scores.items():
        if bool(((found - alone).abs() > allowed).any()):
            reply = int(((found - alone).abs() > allowed).int().argmax())
            raise GuardError(
                f"a reply's score is {float(alone[reply]):.4g} alone and {float(found[reply]):.4g} {how}: it isn't "
                f"always read at the reply's last token; set a `pad_token_id` that ends no reply (it is "
                f"{base.config.pad_token_id}, and replies end in {stop_token_id})"
            )


def _tiny_replies(base: Any, stop_token_id: int) -> tuple[list[int], list[int], list[int]]:
    """A prompt of 3 tokens and two replies of 3 and 6, the stop token included; no padding token in them."""
    rows = int(base.get_input_embeddings().weight.shape[0])
    plain = [token for token in range(rows) if token not in (stop_token_id, base.config.pad_token_id)]
    picked = torch.randint(0, len(plain), (10,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [plain[i] for i in picked]
    return ids[:3], [*ids[3:5], stop_token_id], [*ids[5:], stop_token_id]


def _pooled(model: nn.Module, sequences: list[list[int]], side: str) -> Tensor:
    """Scores as transformers pools them, (sequences,), padded on one side."""
    base = unwrapped(model)
    pad, width = base.config.pad_token_id, max(map(len, sequences))
    gaps = [width - len(ids) for ids in sequences]
    left = side == "left"
    rows = [[pad] * gap + ids if left else ids + [pad] * gap for ids, gap in zip(sequences, gaps, strict=True)]
    masks = [[0] * gap + [1] * (width - gap) if left else [1] * (width - gap) + [0] * gap for gap in gaps]
    device = base.get_input_embeddings().weight.device
    mask = torch.tensor(masks, device=device)
    output = model(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    )
    scores: Tensor = output.logits[:, 0].float().cpu()
    return scores
