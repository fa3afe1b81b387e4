"""What is held of a reward model: its head trains, counts in float32 and is saved; its scores keep their scale.

Rows 32, 38 and 39 of docs/guard.md. The probe is eight sequences of eight tokens, drawn from the vocabulary and the
same for ever, so that no training text goes with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatalign.errors import GuardError

PROBE = "score_probe"  # in a reward run's artifact, and in the configuration of a whole reward model
_PROBE_SHAPE = (8, 8)
_HIDDEN_STATES = 256
_ROUNDING = 1e-4  # of the scores' spread; bfloat16's is about 4e-3
# Of the scores' spread: a base in half precision or in 4 bits moves them too.
_DRIFT = {"full": 0.1, "half": 0.5}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Mean and standard deviation of the probe's scores, and the spread of scores on training rows where known.

    `half` says that they were computed in half precision or on quantized weights.
    """

    mean: float
    std: float
    spread: float
    half: bool

    def state_dict(self) -> dict[str, Any]:
        """What is stored with the reward model."""
        return asdict(self)


def refuse_frozen_head(head: nn.Module) -> None:
    """Raise GuardError where a reward model that is to be trained has a head that isn't."""
    if not all(parameter.requires_grad for parameter in head.parameters()):
        raise GuardError(
            "the reward model to train: its score head is frozen, so that its scores would be random; keep `score` "
            "among the modules that are trained and saved whole (peft's task type SEQ_CLS, `modules_to_save`)"
        )


def refuse_unsaved_head(trained: Tensor, saved: Tensor | None, folder: Any) -> None:
    """Raise GuardError where a saved reward model's head is missing or not the trained one."""
    if saved is None or not torch.equal(saved.float().cpu(), trained.detach().float().cpu()):
        state = "not in its files" if saved is None else "in its files with other weights"
        raise GuardError(
            f"{folder}: its score head is {state}, so that its scores would be random; keep `score` "
            "among the modules that are trained and saved whole (peft's task type SEQ_CLS, `modules_to_save`)"
        )


def refuse_low_precision(head: nn.Module) -> None:
    """Raise GuardError where a head's scores are rounded more coarsely than float32, in whatever type they come."""
    weight = next(head.parameters()).detach()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_HIDDEN_STATES, weight.shape[-1], generator=generator).to(weight.device)
    with torch.no_grad():
        scores = head(hidden).flatten().cpu().double()
    exact = hidden.cpu().double() @ weight.cpu().double().flatten()
    spread = float(exact.std())
    gap = float((scores - exact).abs().max())
    if gap > _ROUNDING * spread:
        raise GuardError(
            f"the score head is off by {gap / spread:.1e} of its scores' spread, and {_HIDDEN_STATES} replies share "
            f"{scores.unique().numel()} scores: it counts in low precision; keep it, and its input, in float32"
        )


def probe_ids(tokenizer: Any) -> Tensor:
    """The probe's token ids, (8, 8), none of them special."""
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    generator = torch.Generator().manual_seed(0)
    return plain[torch.randint(0, len(plain), _PROBE_SHAPE, generator=generator)]


def measure_probe(model: Any, tokenizer: Any, *, half: bool, spread: float = 0.0) -> Scale:
    """Score the probe with a reward model as transformers runs it, on the device where it is."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad():
        scores = model(input_ids=probe_ids(tokenizer).to(device), use_cache=False).logits[:, 0]
    model.train(training)
    return scale_of(scores, half=half, spread=spread)


def scale_of(scores: Tensor, *, half: bool, spread: float = 0.0) -> Scale:
    """The scale of the probe's scores (8,)."""
    scores = scores.detach().cpu().double()
    return Scale(mean=float(scores.mean()), std=float(scores.std()), spread=spread, half=half)


def refuse_drift(stored: Mapping[str, Any] | None, found: Scale, source: str) -> None:
    """Raise GuardError where the probe's scores have another mean or deviation than when the model was saved.

    `stored` is None for a reward model that nothing was stored with.
    """
    if not stored:
        return
    saved = Scale(**stored)
    unit = max(saved.std, saved.spread)
    drift = max(abs(found.mean - saved.mean), abs(found.std - saved.std))
    if not drift <= _DRIFT["half" if saved.half or found.half else "full"] * unit:
        raise GuardError(
            f"{source}: its scores of the probe are {found.mean:.3g} ± {found.std:.3g}, and were {saved.mean:.3g} ± "
            f"{saved.std:.3g} when it was saved: their scale has drifted; restore its files, and load it in the "
            "precision and on the base that it was trained with"
        )
