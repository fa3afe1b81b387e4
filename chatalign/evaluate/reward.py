"""What a reward model thinks: of replies, and of held-out preference pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from chatalign.data.chat import EncodedPair, chat_encoder
from chatalign.data.collate import Batch, collate_pairs, collate_sequences
from chatalign.data.packing import token_budget_batches
from chatalign.data.rows import BadRow, Conversation
from chatalign.engine.batching import to_device
from chatalign.engine.isolation import enable_segments
from chatalign.errors import DataError
from chatalign.evaluate.compare import accuracy_of
from chatalign.evaluate.heldout import Pair, Question
from chatalign.evaluate.policy import Answers, merged, token_budget
from chatalign.maths.length import length_bias
from chatalign.models.heads import load_reward_model, scores_at
from chatalign.models.load import load_tokenizer
from chatalign.recipe import ModelSection, QuantizationSection


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A reward model, frozen, on its device."""

    model: Any
    tokenizer: Any
    device: torch.device


@contextmanager
def opened_judge(section: ModelSection, quantization: QuantizationSection | None) -> Iterator[Judge]:
    """The reward model of a section for as long as the context lasts."""
    tokenizer = load_tokenizer(section, chat=True)
    model = load_reward_model(section, tokenizer, quantization=quantization).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if quantization is None:
        model = merged(model).to(device)
    enable_segments(model, section.attention)
    try:
        yield Judge(model=model, tokenizer=tokenizer, device=device)
    finally:
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def reply_scores(judge: Judge, questions: Sequence[Question], answers: Answers, *, same_tokens: bool) -> list[float]:
    """One raw score a reply: of the sampled ids with `same_tokens`, else of the text in the judge's own template.

    A reply that was cut by its length has no stop token in either case: the judge sees that it doesn't end.
    """
    if same_tokens:
        pairs = list(zip(answers.prompt_ids, answers.response_ids, strict=True))
    else:
        pairs = _retokenized(judge, questions, answers)
    lengths = [len(prompt) + len(reply) for prompt, reply in pairs]
    scores = [0.0 for _ in lengths]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for rows in token_budget_batches(lengths, token_budget(judge.device), order=order):
        batch = collate_sequences([pairs[i][0] for i in rows], [pairs[i][1] for i in rows])
        batch["pool_positions"] = batch["segments"][:, 1].long() - 1
        for i, score in zip(rows, _scores(judge, batch), strict=True):
            scores[i] = score
    return scores


def _retokenized(judge: Judge, questions: Sequence[Question], answers: Answers) -> list[tuple[list[int], list[int]]]:
    """Prompt and reply ids in the judge's own tokens."""
    rows = [
        Conversation(
            messages=[*question.messages, {"role": "assistant", "content": text}],
            first_supervised=len(question.messages),
            tools=question.tools,
        )
        for question, text in zip(questions, answers.texts, strict=True)
    ]
    pairs = []
    for encodings, ended in zip(
        chat_encoder(judge.tokenizer).conversations(rows, "last_assistant"), answers.ended, strict=True
    ):
        if isinstance(encodings, BadRow):
            raise DataError(f"a reply can't be put into the reward model's chat template: {encodings}")
        first, last = encodings[-1].spans[-1]
        ids = encodings[-1].ids
        pairs.append((ids[:first], ids[first : last if ended else max(last - 1, first)]))
    return pairs


def pair_accuracies(judge: Judge, pairs: Sequence[Pair]) -> dict[str, float | int]:
    """Share of pairs whose chosen reply scores higher (ties ½): over all, and for each contrast that rows name.

    Keys: ``accuracy``, ``{contrast}_accuracy``, ``n``, ``{contrast}_n``, ``margin`` (mean difference of raw scores),
    and those of :class:`chatalign.maths.length.LengthBias` that can be said.
    """
    encoded = []
    for place, pair in enumerate(chat_encoder(judge.tokenizer).pairs([pair.preference for pair in pairs]), start=1):
        if isinstance(pair, BadRow):
            raise DataError(f"`eval.pairs`, pair {place}: {pair}")
        encoded.append(pair)
    lengths = [_length(pair) for pair in encoded]
    scores = [(0.0, 0.0) for _ in encoded]
    for rows in token_budget_batches(
        lengths, token_budget(judge.device), order=sorted(range(len(lengths)), key=lengths.__getitem__)
    ):
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        batch = collate_pairs([{name: getattr(encoded[i], name) for name in names} for i in rows])
        found = _scores(judge, batch)
        for i, chosen, rejected in zip(rows, found[::2], found[1::2], strict=True):
            scores[i] = (chosen, rejected)
    margins = [chosen - rejected for chosen, rejected in scores]
    reply_lengths = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in encoded]
    bias = length_bias(torch.tensor(scores).flatten(), torch.tensor(reply_lengths).flatten())
    result: dict[str, float | int] = {
        "accuracy": accuracy_of(margins),
        "n": len(margins),
        "margin": sum(margins) / len(margins),
        **{name: number for name, number in bias.state_dict().items() if number is not None},
    }
    for contrast in sorted({pair.contrast for pair in pairs if pair.contrast}):
        chosen_ones = [margin for margin, pair in zip(margins, pairs, strict=True) if pair.contrast == contrast]
        result[f"{contrast}_accuracy"] = accuracy_of(chosen_ones)
        result[f"{contrast}_n"] = len(chosen_ones)
    return result


def _length(pair: EncodedPair) -> int:
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def _scores(judge: Judge, batch: Batch) -> list[float]:
    with torch.no_grad():
        return scores_at(judge.model, to_device(batch, judge.device)).float().tolist()
