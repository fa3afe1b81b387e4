"""What is asked of a language model: replies to the held-out prompts, log-probabilities, perplexity.

Models are loaded one at a time; log-probabilities run on the flat layout, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from chatalign.data.chat import chat_encoder
from chatalign.data.collate import Batch, collate_lm, collate_sequences
from chatalign.data.packing import token_budget_batches
from chatalign.data.raw import RawEncoder
from chatalign.data.rows import BadRow
from chatalign.engine.batching import to_device
from chatalign.engine.isolation import enable_segments
from chatalign.engine.loss_head import enable_chunked_head, token_logprobs
from chatalign.errors import DataError
from chatalign.evaluate.heldout import Question
from chatalign.maths.logprobs import sum_by_sequence
from chatalign.models.adapters import load_inference
from chatalign.models.load import load_tokenizer, stop_token_ids
from chatalign.recipe import EvalSection, ModelSection, QuantizationSection
from chatalign.rollout import Sampling, TransformersRollout

# A CPU is fastest where a batch's activations stay in its caches.
_TOKENS_A_BATCH = {"cpu": 2048, "cuda": 16384}
_PERPLEXITY_CONTEXT = 1024
Step = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A model ready to answer, on its device."""

    model: Any
    tokenizer: Any
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's replies, in the order of the questions; `texts` are without the stop token, other specials left in."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    ended: list[bool]
    texts: list[str]


@contextmanager
def opened(section: ModelSection, quantization: QuantizationSection | None) -> Iterator[Policy]:
    """The model of a section, its adapter on, for as long as the context lasts; its memory is freed afterwards."""
    tokenizer = load_tokenizer(section)
    model = load_inference(section, tokenizer, quantization=quantization)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if quantization is None:
        model = merged(model).to(device)
    enable_segments(model, section.attention)
    enable_chunked_head(model)
    try:
        yield Policy(model=model, tokenizer=tokenizer, device=device)
    finally:
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def token_budget(device: torch.device) -> int:
    """Tokens of one scoring batch."""
    return _TOKENS_A_BATCH.get(device.type, _TOKENS_A_BATCH["cpu"])


def merged(model: Any) -> Any:
    """The adapter folded into float32 weights, which decode faster; below float32 the sums would be rounded."""
    if hasattr(model, "merge_and_unload") and all(p.dtype == torch.float32 for p in model.parameters()):
        return model.merge_and_unload()
    return model


def answer(policy: Policy, questions: Sequence[Question], section: EvalSection, step: Step) -> Answers:
    """A reply to every question. A reply depends on the seed and its question's place alone, not on the batches."""
    prompt_ids = prompts_of(policy.tokenizer, questions)
    stops = stop_token_ids(policy.tokenizer, getattr(policy.model, "generation_config", None))
    sampling = Sampling(
        max_new_tokens=section.max_new_tokens,
        stop_token_ids=tuple(stops),
        temperature=section.temperature,
        top_p=section.top_p,
        forbidden_token_ids=(policy.tokenizer.pad_token_id,),
        seed=section.seed,
    )
    engine = TransformersRollout(policy.model, policy.tokenizer.pad_token_id, batch_size=section.batch_size)
    response_ids: list[list[int]] = [[] for _ in questions]
    ended = [False for _ in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompt_ids[i]))
    for start in range(0, len(order), section.batch_size):
        chosen = order[start : start + section.batch_size]
        rollout = engine.generate([prompt_ids[i] for i in chosen], sampling, row_seeds=chosen)
        for i, ids, end in zip(chosen, rollout.response_ids, rollout.ended, strict=True):
            response_ids[i], ended[i] = ids, end
        step(len(chosen))
    bodies = [ids[:-1] if end else ids for ids, end in zip(response_ids, ended, strict=True)]
    texts = policy.tokenizer.batch_decode(bodies, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answers(prompt_ids=prompt_ids, response_ids=response_ids, ended=ended, texts=texts)


def prompts_of(tokenizer: Any, questions: Sequence[Question]) -> list[list[int]]:
    """Token ids of each prompt: the chat template with its generation prompt; plain text where there is no template."""
    if not tokenizer.chat_template and all(question.raw for question in questions):
        encoder = RawEncoder(tokenizer, parse_special=False)
        return [encoder.prompt(question.messages[-1]["content"]) for question in questions]
    encoded = chat_encoder(tokenizer).prompts([(question.messages, question.tools) for question in questions])
    for place, ids in enumerate(encoded, start=1):
        if isinstance(ids, BadRow):
            raise DataError(f"`eval.prompts`, prompt {place}: {ids}")
    return [ids for ids in encoded if not isinstance(ids, BadRow)]


def reply_logps(policy: Policy, answers: Answers, *, temperature: float) -> list[float]:
    """log π(reply | prompt) of each reply in nats, its stop token included, from softmax(logits / temperature)."""
    lengths = [len(p) + len(r) for p, r in zip(answers.prompt_ids, answers.response_ids, strict=True)]
    logps = [0.0 for _ in lengths]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])  # equal lengths meet: one kernel for them
    for rows in token_budget_batches(lengths, token_budget(policy.device), order=order):
        batch = collate_sequences([answers.prompt_ids[i] for i in rows], [answers.response_ids[i] for i in rows])
        for i, value in zip(rows, _sums(policy, batch, temperature), strict=True):
            logps[i] = value
    return logps


def perplexity(policy: Policy, texts: Sequence[str], step: Step) -> float:
    """exp of the mean negative log-likelihood a token, over all texts, BOS not predicted and EOS included.

    Texts are read in stretches of 1,024 tokens, each on its own. It compares models of one tokenizer only.
    """
    documents = RawEncoder(policy.tokenizer, parse_special=False).documents(texts)
    pieces = [
        ids[start : start + _PERPLEXITY_CONTEXT]
        for ids in documents
        for start in range(0, len(ids), _PERPLEXITY_CONTEXT)
    ]
    pieces = [piece for piece in pieces if len(piece) > 1]
    total, tokens = 0.0, 0
    for rows in token_budget_batches([len(piece) for piece in pieces], token_budget(policy.device)):
        batch = collate_lm([{"input_ids": pieces[i], "supervised": [1] * len(pieces[i])} for i in rows])
        total += sum(_sums(policy, batch, 1.0))
        tokens += len(batch["targets"])
        step(len(rows))
    return math.exp(-total / tokens) if tokens else math.nan


def _sums(policy: Policy, batch: Batch, temperature: float) -> list[float]:
    placed = to_device(batch, policy.device)
    with torch.no_grad():
        logps_K, _ = token_logprobs(policy.model, placed, temperature=temperature)
        return sum_by_sequence(logps_K, placed["sequence_index"], int(batch["num_sequences"])).tolist()
