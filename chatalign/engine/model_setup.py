"""What a model is given before it trains: its attention, kernels, checkpointed layers, compiled layers, loss head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import TrainingArguments

from chatalign.engine.batching import Bins, row_lengths
from chatalign.engine.fused_layers import fuse_layers
from chatalign.engine.isolation import enable_segments, unwrapped
from chatalign.engine.layers import apply_liger, checkpoint_layers, compile_layers, decoder_layers
from chatalign.engine.levers import Levers, described
from chatalign.engine.loss_head import enable_chunked_head
from chatalign.engine.memory import StepMemory, available_bytes, layers_to_checkpoint, measure_step
from chatalign.errors import ModelError
from chatalign.recipe import StageRecipe

# The largest logits of the loss head: three buffers of a chunk (loss_head, linear_logprobs).
_HEAD_BYTES = 3 * 256 * 2**20


def set_up(
    model: nn.Module,
    recipe: StageRecipe,
    levers: Levers,
    args: TrainingArguments,
    *,
    rows: Bins,
    beside: Sequence[nn.Module] = (),
) -> str:
    """Prepare a model to train on `rows`, under the caller's autocast; returns the record of what it runs with.

    `beside` are other models that share the device's memory. Raises ModelError where the model can't do it.
    """
    levers = with_kernels(model, recipe, levers)
    if levers.fused:
        fuse_layers(model, lora_alone=levers.compile)
    attention = enable_segments(model, recipe.model.attention)
    layers = len(decoder_layers(model))
    checkpointed = layers if levers.checkpointing is True else 0
    if levers.checkpointing == "auto" and (available := available_bytes(args.device)) is not None:
        step = step_memory(model, args, beside)
        if checkpointed := layers_to_checkpoint(step, largest_batch(rows, args), available):
            checkpoint_layers(model, checkpointed)
    enable_chunked_head(model)
    if levers.compile:
        compile_layers(model, checkpointed=checkpointed)
    return described(
        levers,
        attention=attention,
        optim=str(recipe.train.optim),
        fp16=recipe.train.fp16,
        checkpointed=checkpointed,
        layers=layers,
    )


def set_up_reference(model: nn.Module, recipe: StageRecipe, levers: Levers) -> None:
    """Prepare a frozen twin as the policy is, under the caller's autocast, so that the two round alike."""
    with_kernels(model, recipe, levers)
    if levers.fused:
        fuse_layers(model, lora_alone=levers.compile)
    enable_segments(model, recipe.model.attention)
    enable_chunked_head(model)
    if levers.compile:
        compile_layers(model)


def with_kernels(model: nn.Module, recipe: StageRecipe, levers: Levers) -> Levers:
    """Apply Liger's kernels where the levers have them; the levers without, where Liger has none for the model.

    Raises ModelError where the recipe asks for them by name.
    """
    if levers.liger is None or apply_liger(model, levers.liger):
        return levers
    if recipe.train.use_liger_kernel:
        name = unwrapped(model).config.model_type
        raise ModelError(f"Liger has no kernels for {name} models; take `train.use_liger_kernel` out")
    return replace(levers, liger=None)


def step_memory(model: nn.Module, args: TrainingArguments, beside: Sequence[nn.Module]) -> StepMemory:
    """What a step of this model takes, by its arguments."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ModelError("`train.gradient_checkpointing: auto` can't measure sharded weights; give true or false")
    if not decoder_layers(model):
        name = type(unwrapped(model)).__name__
        raise ModelError(f"{name} has no layers that could be checkpointed; set `train.gradient_checkpointing: false`")
    head = unwrapped(model).get_output_embeddings()
    trained_head = 0 if head is None or not head.weight.requires_grad else 4 * head.weight.numel()
    return measure_step(
        model, optim=str(args.optim), half=args.bf16 or args.fp16, head_bytes=_HEAD_BYTES + trained_head, beside=beside
    )


def largest_batch(rows: Bins, args: TrainingArguments) -> int:
    """Tokens of the largest micro-batch that there can be."""
    lengths = row_lengths(rows.rows)
    return max(sum(lengths[i] for i in bin_) for bin_ in rows.bins) * args.per_device_train_batch_size
