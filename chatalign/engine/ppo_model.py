"""Policy and value as one module, so that one forward pass of the wrapped module (DDP, ZeRO) serves both.

The value function is one of three: a head on the policy's own hidden states, an adapter of its own on the policy's
backbone, or a backbone of its own. Shapes: K response tokens, T tokens of the flat batch, B replies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from chatalign.engine.attention import segment_inputs
from chatalign.engine.isolation import unwrapped
from chatalign.engine.loss_head import token_logprobs

# exp(−3e4) is 0 in every precision, and −3e4 is finite in fp16: −inf · 0 would make an entropy NaN.
_FORBIDDEN = -3e4


class ValueHead(nn.Linear):
    """Hidden state → expected reward to come, computed in float32 whatever the model's or autocast's precision."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32)
        # V = 0 at the start, unless a reward model's head is put in its place.
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) in any precision → (…) in float32."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)


class PpoOutput(NamedTuple):
    """What one forward pass gives; `ptx_logps` is None without pretraining rows."""

    logps: Tensor  # (K,) log-probabilities of the response tokens at the sampler's temperature, in nats
    entropy: Tensor  # (K,) in nats
    values: Tensor  # (K,) value of the state in which each token is chosen
    ptx_logps: Tensor | None


class PpoModel(nn.Module):
    """The trainable side of PPO."""

    def __init__(
        self,
        policy: Any,
        head: ValueHead,
        *,
        temperature: float,
        entropy_grad: bool = False,
        value_trunk: Any | None = None,
        value_adapter: str | None = None,
        value_origin: str | None = None,
        value_from_zero: bool = True,
    ) -> None:
        super().__init__()
        if value_trunk is not None and value_adapter is not None:
            raise ValueError("the value function has a trunk or an adapter of its own, not both")
        self.policy = policy
        self.value_trunk = value_trunk
        self.value_head = head
        self.value_adapter = value_adapter
        self.value_origin = value_origin  # the reward whose model the value function starts as
        self.value_from_zero = value_from_zero  # V = 0 before the first update: no reward model's head
        self.temperature = temperature
        self.entropy_grad = entropy_grad
        self._adapters = AdapterSwitch(policy) if value_adapter is not None else None
        self._layers = [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]
        super().train(False)
        self.detach_value = False  # value warm-up on a shared trunk trains the head alone

    @property
    def config(self) -> Any:
        """The policy's configuration; the trainer reads and sets it."""
        return self.policy.config

    def get_base_model(self) -> Any:
        """The policy's transformers model, as a peft model gives it."""
        return unwrapped(self.policy)

    def value_parameters(self) -> list[nn.Parameter]:
        """Trainable weights of the value function alone."""
        own = {id(parameter) for parameter in self.value_head.parameters()}
        if self.value_trunk is not None:
            own |= {id(parameter) for parameter in self.value_trunk.parameters()}
        return [
            parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and (id(parameter) in own or (self.value_adapter is not None and f".{self.value_adapter}." in name))
        ]

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the layers that FSDP gathers one at a time."""
        trunks = [unwrapped(self.policy), *([] if self.value_trunk is None else [self.value_trunk])]
        return sorted({name for trunk in trunks for name in trunk._no_split_modules or ()})

    @property
    def shares_trunk(self) -> bool:
        """Whether the value head reads the policy's own hidden states."""
        return self.value_trunk is None and self.value_adapter is None

    def forward(
        self,
        batch: dict[str, Any],
        ptx: dict[str, Any] | None = None,
        *,
        part: Literal["both", "policy", "value"] = "both",
    ) -> PpoOutput:
        """Log-probabilities, entropies and values of a flat batch of replies, and log-probabilities of `ptx`.

        With `part`, of a model whose two sides share no trained weight, what the other side gives is left empty.
        """
        nothing = torch.empty(0)
        if part == "value":
            values = self.value_pass(batch, batch["predict_positions"])
            return PpoOutput(logps=nothing, entropy=nothing, values=values, ptx_logps=None)
        logps, entropy, hidden = self.policy_pass(batch)
        if part == "policy":
            values = nothing
        elif self.shares_trunk:
            values = self.value_head(hidden.detach() if self.detach_value else hidden)
        else:
            values = self.value_pass(batch, batch["predict_positions"])
        ptx_logps = token_logprobs(self.policy, ptx)[0] if ptx is not None else None
        return PpoOutput(logps=logps, entropy=entropy, values=values, ptx_logps=ptx_logps)

    def no_pass(self) -> None:
        """A forward pass of nothing, for what only looks at which module's comes first."""

    def policy_pass(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies (K,) and hidden states (K, D) at the places that predict the response."""
        seen: list[Tensor] = []
        layer = unwrapped(self.policy).get_output_embeddings()
        hook = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        try:
            logps, entropy = token_logprobs(
                self.policy, batch, temperature=self.temperature, entropy=True, entropy_grad=self.entropy_grad
            )
        finally:
            hook.remove()
        assert entropy is not None
        # Without the places that a CPU's bf16 head repeats to round their number up.
        return logps, entropy, seen[0].flatten(0, -2)[: len(logps)]

    def value_pass(self, batch: dict[str, Any], positions: Tensor) -> Tensor:
        """Values at places of a flat batch, for a value function with an adapter or a trunk of its own."""
        trunk = backbone(self.policy) if self.value_trunk is None else self.value_trunk
        with self._value_weights():
            values: Tensor = self.value_head(hidden_states(trunk, batch, positions))
            return values

    def _value_weights(self) -> AbstractContextManager[Any]:
        return self._adapters.use(self.value_adapter) if self._adapters and self.value_adapter else nullcontext()

    @torch.no_grad()
    def measure(self, batch: dict[str, Any], *, logps: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Log-probabilities (K,) where asked for, values (K,), and values after each reply's last token (B,)."""
        last = batch["segments"][:, 1].to(batch["predict_positions"].device).long() - 1
        positions = torch.cat((batch["predict_positions"], last))
        count = len(batch["predict_positions"])
        if not self.shares_trunk:
            values = self.value_pass(batch, positions)
            own = token_logprobs(self.policy, batch, temperature=self.temperature)[0] if logps else None
            return own, values[:count], values[count:]
        # One pass for both: what follows a last token stands in as its target, and is dropped.
        targets = torch.cat((batch["targets"], torch.zeros_like(last)))
        own, _, hidden = self.policy_pass(batch | {"predict_positions": positions, "targets": targets})
        values = self.value_head(hidden)
        return own[:count], values[:count], values[count:]

    def train(self, mode: bool = True) -> PpoModel:
        """Never leaves evaluation mode, so that no dropout disturbs the ratio; layers know that they train.

        Gradient checkpointing asks the layer itself whether it trains, not the dropout inside it. Called at each
        step, so the walk over all modules is made once.
        """
        self.training = mode
        for layer in self._layers:
            layer.training = mode
        return self

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """As `PreTrainedModel`'s, for both trunks, and safe where adapters take turns on one."""
        settings = dict(activation_checkpointing_kwargs or {}) | {"use_reentrant": False}
        if self.value_trunk is not None:
            self.value_trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        if self.value_adapter is not None:
            settings["context_fn"] = self._recompute_contexts
        self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same under its name in transformers before 5.20."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def _recompute_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        # The backward pass comes when another adapter may be active: the recomputation needs the one of its forward.
        assert self._adapters is not None
        return nullcontext(), self._adapters.use(self._adapters.active)


class AdapterSwitch:
    """Another adapter of a peft model for a while, at the cost of one attribute a layer.

    peft's own switch also sets every weight's gradient flag, which must stay as it is here, and walks the whole
    model for it: 12 ms for 28 layers with four adapters each, several times an optimizer step.
    """

    def __init__(self, model: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._whole = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]

    @property
    def active(self) -> str:
        """The adapter in use."""
        name: str = self._layers[0].active_adapters[0]
        return name

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run with adapter `name`; the one before comes back afterwards."""
        modules: list[Any] = [*self._layers, *self._whole]
        before = [(module, module._active_adapter) for module in modules]
        for layer in self._layers:
            layer._active_adapter = [name]
        for whole in self._whole:  # an adapter without a copy of its own uses the base's module
            whole._active_adapter = [name] if name in whole.modules_to_save else []
        try:
            yield
        finally:
            for module, active in before:
                module._active_adapter = active


def backbone(model: Any) -> Any:
    """The transformer below a model's head, inside any wrappers."""
    base = unwrapped(model)
    return getattr(base, base.base_model_prefix)


def hidden_states(trunk: Any, batch: dict[str, Any], positions: Tensor) -> Tensor:
    """Last hidden states of a backbone at places of a flat batch, (len(positions), D)."""
    states: Tensor = trunk(**segment_inputs(batch, positions)).last_hidden_state[0, positions]
    return states


def forbid_tokens(model: Any, token_ids: Sequence[int]) -> bool:
    """Give tokens probability 0 wherever `model` computes logits: sampler and trainer then agree by construction.

    A bias on the output layer, never saved. False, and nothing changed, where that layer isn't a plain linear one
    without a bias of its own.
    """
    layer = unwrapped(model).get_output_embeddings()
    if type(layer) is not nn.Linear or layer.bias is not None or hasattr(layer.weight, "ds_id"):
        return False
    bias = torch.zeros(layer.out_features, dtype=layer.weight.dtype, device=layer.weight.device)
    bias[[token for token in token_ids if token < layer.out_features]] = _FORBIDDEN
    del layer._parameters["bias"]
    layer.register_buffer("bias", bias, persistent=False)
    return True


def allow_all_tokens(model: Any) -> None:
    """Undo `forbid_tokens`."""
    layer = unwrapped(model).get_output_embeddings()
    if "bias" in getattr(layer, "_buffers", {}):
        del layer._buffers["bias"]
        layer.register_parameter("bias", None)
