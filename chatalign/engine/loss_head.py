"""The loss head: log-probabilities of a batch's targets, from logits where that is cheap, in chunks where it isn't.

The chunked head takes the place of the output layer's forward pass, so that it runs inside the wrapped model (DDP,
PEFT, autocast) as any layer would. It is used only on models whose logits are exactly the output layer's result:
a logit softcap or scale after it (Gemma 2, Cohere, Granite) is found by running one token, and keeps the plain head.

Shapes: K kept tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from chatalign.engine.attention import segment_inputs
from chatalign.engine.isolation import computes_in_half, unwrapped
from chatalign.engine.last_layer import HALF_MULTIPLE
from chatalign.maths import logprobs

# Of fp32 logits. Below the first the plain head is as fast and small; a CPU's chunks should stay near its caches.
_PLAIN_LOGITS_BYTES = 8 * 2**20
_CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
# Of a CPU's log-probabilities that a trained head keeps for the backward pass: their products needn't be made again.
_KEPT_BYTES = {"cpu": 64 * 2**20}
_IN_HALF = "chatalign_in_half"


@dataclass(frozen=True)
class _Request:
    targets: Tensor
    temperature: float
    entropy: bool
    entropy_grad: bool
    chunk: int
    weights: Tensor | None = None  # (K,): the weighted sum is all that is asked for


_REQUEST: ContextVar[_Request | None] = ContextVar("chatalign_logprobs", default=None)


def _output_layer_forward(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """The output layer's forward pass: logits, or what is asked for.

    That is (1, K, 2) log-probabilities and entropies, or the weighted sum of log-probabilities as (1, 1, 1).
    """
    request = _REQUEST.get()
    if request is None:
        return nn.functional.linear(hidden, layer.weight, layer.bias)
    if request.weights is not None:
        total = logprobs.chunked_linear_logprob_sum(
            hidden.flatten(0, -2), layer.weight, layer.bias, request.targets, request.weights, request.chunk
        )
        return total.view(1, 1, 1)
    logps_K, entropy_K = logprobs.chunked_linear_logprobs(
        hidden.flatten(0, -2),
        layer.weight,
        layer.bias,
        request.targets,
        request.chunk,
        request.temperature,
        entropy=request.entropy,
        entropy_grad=request.entropy_grad,
        kept_tokens=_KEPT_BYTES.get(hidden.device.type, 0) // (4 * int(layer.out_features)),
    )
    return torch.stack((logps_K, entropy_K), dim=-1).unsqueeze(0)


def enable_chunked_head(model: nn.Module) -> bool:
    """Let :func:`token_logprobs` use the chunked head on this model; False where its logits are not the layer's own.

    Called under the autocast that the model will run in: accelerate's is on within the model's forward pass alone.
    """
    base = unwrapped(model)
    setattr(base, _IN_HALF, computes_in_half(model))
    layer = base.get_output_embeddings()
    if layer is None or type(layer) is not nn.Linear or layer.weight.is_meta or hasattr(layer.weight, "ds_id"):
        return False
    if not _is_last(base, layer):
        return False
    # A bound method, not a closure: a deep copy of the model then runs its own layer.
    vars(layer)["forward"] = MethodType(_output_layer_forward, layer)
    return True


def _is_last(base: Any, layer: nn.Linear) -> bool:
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    training = base.training
    base.eval()
    try:
        with torch.no_grad():
            # Several ids: one could be the padding token, whose embedding may be 0, and 0 survives any scale.
            rows, device = base.get_input_embeddings().weight.shape[0], base.get_input_embeddings().weight.device
            ids = torch.arange(min(8, rows), device=device).unsqueeze(0)
            logits = base(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        base.train(training)
    return len(seen) == 1 and bool(logits.any()) and torch.equal(seen[0].float(), logits.float())


def token_logprobs(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target of a flat batch, (K,) in nats and fp32, and the entropies (K,) where asked for.

    `model` is the model as it is trained, wrappers and all. The entropy carries a gradient with `entropy_grad`.
    """
    padded, extra = _rounded_up(model, batch)
    logps_K, entropy_K = _token_logprobs(model, padded, temperature, entropy, entropy_grad)
    if not extra:
        return logps_K, entropy_K
    return logps_K[:-extra], None if entropy_K is None else entropy_K[:-extra]


def sum_of_logprobs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Σ log p of a flat batch's targets, one number in nats: what :func:`token_logprobs` gives, summed, for less."""
    padded, extra = _rounded_up(model, batch)
    chunk = _chunk_tokens(model, padded["targets"])
    if not chunk:
        return token_logprobs(model, batch)[0].sum()
    weights_K = torch.ones(len(padded["targets"]), device=padded["targets"].device)
    weights_K[len(weights_K) - extra :] = 0
    request = _Request(padded["targets"], 1.0, entropy=False, entropy_grad=False, chunk=chunk, weights=weights_K)
    with _asking(request):
        total: Tensor = model(
            **segment_inputs(padded, padded["predict_positions"]), logits_to_keep=padded["predict_positions"]
        ).logits
    return total.sum()


def _rounded_up(model: nn.Module, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The batch with so many targets repeated at its end that half-precision kernels meet few shapes; how many."""
    targets, kept = batch["targets"], batch["predict_positions"]
    half = getattr(unwrapped(model), _IN_HALF, False) or torch.is_autocast_enabled("cpu")  # or the caller's own
    extra = -len(kept) % HALF_MULTIPLE if half and kept.device.type == "cpu" else 0
    if not extra or not len(kept):
        return batch, 0
    more = {"targets": _repeat_last(targets, extra), "predict_positions": _repeat_last(kept, extra)}
    return batch | more, extra


def _repeat_last(values_K: Tensor, extra: int) -> Tensor:
    return torch.cat((values_K, values_K[-1:].expand(extra)))


def _token_logprobs(
    model: nn.Module, batch: dict[str, Any], temperature: float, entropy: bool, entropy_grad: bool
) -> tuple[Tensor, Tensor | None]:
    targets, kept = batch["targets"], batch["predict_positions"]
    inputs = segment_inputs(batch, kept)
    chunk = _chunk_tokens(model, targets)
    if chunk:
        request = _Request(
            targets=targets, temperature=temperature, entropy=entropy, entropy_grad=entropy_grad, chunk=chunk
        )
        with _asking(request):
            both_K2 = model(**inputs, logits_to_keep=kept).logits[0]
        logps_K, entropy_K = both_K2.unbind(-1)
        return logps_K, (entropy_K if entropy_grad else entropy_K.detach()) if entropy else None
    logits_KV = model(**inputs, logits_to_keep=kept).logits[0]
    logps_K = logprobs.selected_logprobs(logits_KV, targets, temperature)
    if not entropy:
        return logps_K, None
    return logps_K, logprobs.entropy(logits_KV if entropy_grad else logits_KV.detach(), temperature)


@contextmanager
def _asking(request: _Request) -> Iterator[None]:
    token = _REQUEST.set(request)
    try:
        yield
    finally:
        _REQUEST.reset(token)


def _chunk_tokens(model: nn.Module, targets: Tensor) -> int:
    """Tokens a chunk, or 0 for the plain head."""
    layer = unwrapped(model).get_output_embeddings()
    if (
        not isinstance(getattr(layer, "forward", None), MethodType)
        or layer.forward.__func__ is not _output_layer_forward
    ):
        return 0
    vocabulary = int(layer.out_features)
    if targets.numel() * vocabulary * 4 <= _PLAIN_LOGITS_BYTES:
        return 0
    return max(64, _CHUNK_BYTES.get(targets.device.type, _CHUNK_BYTES["cuda"]) // (4 * vocabulary))
