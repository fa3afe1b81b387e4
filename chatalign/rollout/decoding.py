"""A batch in the middle of generation: its cache, its masks, and one forward pass a token.

Rows are left-padded, so the next token of every row is in the same column; position ids count real tokens.
Shapes: B rows still alive, L columns so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_SPARE = 64
# Prompts read at once: sorted by length they need little padding, and few are small in memory.
_PREFILL_ROWS = 16


class GrowingLayer(DynamicLayer):
    """Keys and values with room to spare: `DynamicLayer` copies the whole cache for each new token."""

    def __init__(self) -> None:
        super().__init__()
        self._key_buffer = self._value_buffer = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, new, d); returns all of them, as views of the buffers."""
        key_states, value_states = _as_attention_takes_them(key_states), _as_attention_takes_them(value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized or end > self._key_buffer.shape[-2]:
            self._move(key_states, value_states, start, capacity=end + max(_SPARE, end // 4))
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def _move(self, key_states: Tensor, value_states: Tensor, filled: int, *, capacity: int) -> None:
        old_keys, old_values = self._key_buffer, self._value_buffer
        rows, heads, _, width = key_states.shape
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._key_buffer = key_states.new_empty(rows, heads, capacity, width)
        self._value_buffer = value_states.new_empty(rows, heads, capacity, value_states.shape[-1])
        if filled:
            self._key_buffer[:, :, :filled] = old_keys[:, :, :filled]
            self._value_buffer[:, :, :filled] = old_values[:, :, :filled]

    def put(self, rows: slice, keys: Tensor, values: Tensor, *, batch: int, columns: int) -> None:
        """Set the last columns of some rows of a new cache for `batch` rows and `columns` tokens; 0 before them."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            capacity = columns + max(_SPARE, columns // 4)
            self._key_buffer = keys.new_empty(batch, keys.shape[1], capacity, keys.shape[-1])
            self._value_buffer = values.new_empty(batch, values.shape[1], capacity, values.shape[-1])
            self.keys, self.values = self._key_buffer[:, :, :columns], self._value_buffer[:, :, :columns]
        for buffer, read in ((self._key_buffer, keys), (self._value_buffer, values)):
            pads = columns - read.shape[-2]
            buffer[rows, :, :pads] = 0  # what a mask hides is multiplied by 0, and memory as it comes may hold a NaN
            buffer[rows, :, pads:columns] = read

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; only rows that change their place are copied."""
        if not self.is_initialized:
            return
        filled, kept = self.get_seq_length(), len(indices)
        places = (indices != torch.arange(kept, device=indices.device)).nonzero().squeeze(1)
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[places, :, :filled] = buffer[indices[places], :, :filled]
        self._key_buffer, self._value_buffer = self._key_buffer[:kept], self._value_buffer[:kept]
        self.keys, self.values = self._key_buffer[:, :, :filled], self._value_buffer[:, :, :filled]


def _as_attention_takes_them(states: Tensor) -> Tensor:
    """Rounded once: rotary embedding leaves keys in float32, and autocast would round the whole cache at each token."""
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def new_cache(model: Any) -> tuple[DynamicCache, bool]:
    """A cache for `model`, and whether its layers all keep every token (no sliding window, no recurrent state)."""
    cache = DynamicCache(config=model.config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    if plain:
        cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache, plain


class Decoding:
    """Left-padded rows of one model, fed a token at a time."""

    def __init__(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], pad_token_id: int) -> None:
        device = next(model.parameters()).device
        width = max(len(ids) for ids in prompt_ids)
        padded = [[pad_token_id] * (width - len(ids)) + list(ids) for ids in prompt_ids]
        self.model = model
        self.input_ids_BL = torch.tensor(padded, device=device)
        self.lengths_B = torch.tensor([len(ids) for ids in prompt_ids], device=device)
        self.padded = any(len(ids) < width for ids in prompt_ids)
        self.cache, self.plain_cache = new_cache(model)
        self.takes_positions = "position_ids" in _forward_parameters(model)
        self.real_BL = torch.arange(width, device=device) >= (width - self.lengths_B)[:, None]

    def prefill(self) -> Tensor:
        """Read the prompts; the logits that predict each row's first new token, (B, V)."""
        if not self.plain_cache or not self.takes_positions:
            positions_BL = (self.real_BL.long().cumsum(-1) - 1).clamp(min=0)
            return self._forward(self.input_ids_BL, positions_BL, self.real_BL.long(), self.cache)
        batch, columns = self.input_ids_BL.shape
        logits = []
        for start in range(0, batch, _PREFILL_ROWS):
            rows = slice(start, start + _PREFILL_ROWS)
            width = int(self.lengths_B[rows].max())
            part, _ = new_cache(self.model)
            logits.append(
                self._read(self.input_ids_BL[rows, columns - width :], self.real_BL[rows, columns - width :], part)
            )
            if batch <= _PREFILL_ROWS:
                self.cache = part
                break
            layers: Any = zip(self.cache.layers, part.layers, strict=True)  # GrowingLayers, all of them
            for whole, read in layers:
                whole.put(rows, read.keys, read.values, batch=batch, columns=columns)
        return torch.cat(logits)

    def _read(self, input_ids_BL: Tensor, real_BL: Tensor, cache: DynamicCache) -> Tensor:
        """Prompts of about one length into a cache of their own; the logits that predict their first new tokens."""
        width = input_ids_BL.shape[1]
        positions_BL = (real_BL.long().cumsum(-1) - 1).clamp(min=0)
        mask: Tensor | None = None
        if not bool(real_BL.all()):
            columns = torch.arange(width, device=real_BL.device)
            causal_LL = columns[:, None] >= columns
            # A pad attends to itself: a row that may attend to nothing becomes NaN, and 0 · NaN spreads it.
            mask = (causal_LL & real_BL[:, None, :] | torch.eye(width, dtype=torch.bool, device=columns.device))[
                :, None
            ]
        return self._forward(input_ids_BL, positions_BL, mask, cache)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Feed one token a row; the logits that predict the next one, (B, V)."""
        self.real_BL = torch.nn.functional.pad(self.real_BL, (0, 1), value=True)
        positions_B1 = self.lengths_B[:, None]
        self.lengths_B = self.lengths_B + 1
        mask: Tensor | None = None
        if not self.plain_cache or not self.takes_positions:
            mask = self.real_BL.long()
        elif self.padded:
            mask = self.real_BL[:, None, None, :]
        return self._forward(tokens_B[:, None], positions_B1, mask, self.cache)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.lengths_B, self.real_BL = self.lengths_B[rows], self.real_BL[rows]

    def _forward(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if self.takes_positions:
            inputs["position_ids"] = position_ids
        output = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def _forward_parameters(model: Any) -> set[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)
