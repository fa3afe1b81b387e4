"""The floor: a bare PyTorch loop over the packed tokens that chatalign trains on; no trainer, no metric, no check.

Documents in a pack are kept apart by transformers' own SDPA with reset position ids (right only with
``use_cache=False``); the loss is cross-entropy over logits of every position, the optimizer fused AdamW.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatalign.data.packing import best_fit_decreasing

ARGS = harness.arguments()
LENGTH = 512


def tokens(tokenizer: Any, file: str) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row, the reply supervised."""
    found = []
    for row in harness.read_rows(file):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        reply = tokenizer(row["completion"][0]["content"] + "<|im_end|>")["input_ids"]
        found.append((prompt + reply, [-100] * len(prompt) + reply))
    return found


def pack(rows: list[tuple[list[int], list[int]]]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Batches of (ids, positions, labels), each (packs, 512), and their real tokens; padding is a document too."""
    bins = best_fit_decreasing([len(ids) for ids, _ in rows], LENGTH)
    order = torch.randperm(len(bins), generator=torch.Generator().manual_seed(0)).tolist()
    batches = []
    for start in range(0, len(order), harness.PACKS):
        packs = [[rows[i] for i in bins[b]] for b in order[start : start + harness.PACKS]]
        ids = torch.zeros(len(packs), LENGTH, dtype=torch.long)
        positions = torch.arange(LENGTH).repeat(len(packs), 1)
        labels = torch.full((len(packs), LENGTH), -100)
        for p, documents in enumerate(packs):
            place = 0
            for document, targets in documents:
                end = place + len(document)
                ids[p, place:end] = torch.tensor(document)
                positions[p, place:end] = torch.arange(len(document))
                labels[p, place + 1 : end] = torch.tensor(targets[1:])
                place = end
            positions[p, place:] = torch.arange(LENGTH - place)
        batches.append((ids, positions, labels, sum(len(d) for documents in packs for d, _ in documents)))
    return batches


def loss_of(model: Any, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], items: int) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens, divided by `items`."""
    ids, positions, labels, _ = batch
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ARGS.dtype == "bfloat16"):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    shifted = labels[:, 1:].flatten()
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), shifted, ignore_index=-100, reduction="sum") / items


def supervised(batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]) -> int:
    """Targets of all batches."""
    return sum(int((labels != -100).sum()) for _, _, labels, _ in batches)


def main() -> None:
    """Probe, train one epoch, write."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ARGS.model)
    model = AutoModelForCausalLM.from_pretrained(ARGS.model, dtype=torch.float32).train()
    if "lora" in ARGS.work:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=harness.LINEARS, task_type="CAUSAL_LM", **harness.LORA))
    trained = [p for p in model.parameters() if p.requires_grad]
    measured = harness.Measured(trainable=sum(p.numel() for p in trained))
    probe = pack(tokens(tokenizer, ARGS.probe))
    losses = [loss_of(model, batch, supervised(probe)) for batch in probe]
    sum(losses).backward()
    measured.probe = {"probe_loss": float(sum(losses).detach()), "probe_grad_norm": harness.gradient_norm(model)}
    model.zero_grad()
    optimizer = torch.optim.AdamW(trained, lr=harness.LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = pack(tokens(tokenizer, ARGS.rows))
    measured.memory_before_mb = harness.peak_mb()
    for step, batch in enumerate(batches):
        harness.wait_for_turn(step, len(batches))
        loss = loss_of(model, batch, supervised([batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        measured.losses.append(float(loss))
        measured.items.append(batch[-1])
        harness.mark(measured)
    harness.finish(measured, ARGS, "floor", ["peft"])


main()
