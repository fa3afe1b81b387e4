"""The decode loop against `generate`, against one whole forward pass, and against itself in another order."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from chatalign.rollout import Sampling, TransformersRollout, decoding, stream_reply
from chatalign.rollout.decoding import Decoding
from chatalign.rollout.sampler import Sampler
from chatalign.rollout.transformers_engine import cut_at_stops

PAD, STOPS = 0, (3, 7, 11)
PROMPTS = [[5, 6, 8], [9], [12, 4, 13, 6, 8, 17, 20], [5, 30], [21, 22, 23, 24, 25], [9, 9, 9]]


def _model(family: str) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "vocab_size": 40, "pad_token_id": PAD, "eos_token_id": 3, "bos_token_id": 1}
    shape |= {"initializer_range": 0.3}
    if family == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=40, pad_token_id=PAD, eos_token_id=3, bos_token_id=1,
            initializer_range=0.3,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=2, sliding_window=4))
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))


def _whole_forward_logprobs(model: Any, prompt: list[int], reply: list[int], temperature: float) -> list[float]:
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits[:, PAD] = -torch.inf
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(1, torch.tensor(reply)[:, None]).squeeze(1).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral"])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_greedy_is_generate_token_for_token(family: str, batch_size: int) -> None:
    model = _model(family).eval()
    sampling = Sampling(max_new_tokens=12, stop_token_ids=STOPS, temperature=0.0)
    rollout = TransformersRollout(model, PAD, batch_size=batch_size).generate(PROMPTS, sampling)
    for prompt, reply, ended in zip(PROMPTS, rollout.response_ids, rollout.ended, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(STOPS),
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        assert reply == theirs
        assert ended == (reply[-1] in STOPS)
        assert not set(reply[:-1]) & set(STOPS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral"])
def test_logprobs_are_those_of_one_whole_unpadded_forward(family: str) -> None:
    model = _model(family)
    sampling = Sampling(
        max_new_tokens=10, stop_token_ids=STOPS, temperature=0.7, top_p=0.8, top_k=20, forbidden_token_ids=(PAD,)
    )
    rollout = TransformersRollout(model, PAD).generate(PROMPTS, sampling)
    for prompt, reply, logps in zip(PROMPTS, rollout.response_ids, rollout.logprobs, strict=True):
        assert logps == pytest.approx(_whole_forward_logprobs(model, prompt, reply, 0.7), abs=1e-4)


def test_a_reply_does_not_depend_on_its_batch_or_place() -> None:
    model = _model("llama")
    sampling = Sampling(max_new_tokens=12, stop_token_ids=STOPS, seed=5)
    seeds = [100 + row for row in range(len(PROMPTS))]
    together = TransformersRollout(model, PAD).generate(PROMPTS, sampling, row_seeds=seeds)
    backwards = TransformersRollout(model, PAD, batch_size=2).generate(PROMPTS[::-1], sampling, row_seeds=seeds[::-1])
    assert together.response_ids == backwards.response_ids[::-1]
    assert together.ended == backwards.ended[::-1]
    lengths = {len(ids) for ids in together.response_ids}
    assert len(lengths) > 1, "the test needs rows that finish at different steps"
    other = TransformersRollout(model, PAD).generate(PROMPTS, replace(sampling, seed=6), row_seeds=seeds)
    assert other.response_ids != together.response_ids


def test_the_same_prompt_in_two_rows_gets_two_replies() -> None:
    sampling = Sampling(max_new_tokens=12, stop_token_ids=())
    replies = TransformersRollout(_model("llama"), PAD).generate([[5, 6]] * 8, sampling).response_ids
    assert len({tuple(reply) for reply in replies}) == 8


def test_pad_as_stop_token_stays_in_the_reply() -> None:
    sampling = Sampling(max_new_tokens=30, stop_token_ids=(PAD, 3))
    rollout = TransformersRollout(_model("llama"), PAD).generate(PROMPTS * 4, sampling)
    stopped_at_pad = [ids for ids, ended in zip(rollout.response_ids, rollout.ended, strict=True) if ids[-1] == PAD]
    assert stopped_at_pad, "the test needs a reply that ends in pad"
    assert all(ids.count(PAD) == 1 for ids in stopped_at_pad)
    assert all(len(ids) == len(lp) for ids, lp in zip(rollout.response_ids, rollout.logprobs, strict=True))


def test_forbidden_tokens_never_come_and_minimum_length_holds() -> None:
    sampling = Sampling(
        max_new_tokens=16, stop_token_ids=STOPS, forbidden_token_ids=tuple(range(12, 30)), min_new_tokens=6
    )
    rollout = TransformersRollout(_model("llama"), PAD).generate(PROMPTS * 10, sampling)
    assert not {token for ids in rollout.response_ids for token in ids} & set(range(12, 30))
    # The stop token is the seventh at the earliest: six tokens come before it.
    assert min(len(ids) for ids in rollout.response_ids) == 7


def test_dropout_is_off_and_training_mode_is_restored() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, resid_pdrop=0.5)).train()
    model.transformer.h[0].eval()
    sampling = Sampling(max_new_tokens=8, stop_token_ids=())
    rollout = TransformersRollout(model, PAD)
    first, again = (rollout.generate(PROMPTS, sampling) for _ in range(2))
    assert first == again
    assert model.training
    assert not model.transformer.h[0].training


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_gives_the_same_tokens(temperature: float, tiny_tokenizer: Any) -> None:
    model = _model("gpt2")
    sampling = Sampling(max_new_tokens=12, stop_token_ids=STOPS, temperature=temperature, seed=3)
    for prompt in PROMPTS:
        whole = TransformersRollout(model, PAD).generate([prompt], sampling).response_ids[0]
        assert list(stream_reply(model, tiny_tokenizer, prompt, sampling)) == whole


def test_an_empty_prompt_and_missing_seeds_are_refused() -> None:
    sampling = Sampling(max_new_tokens=4, stop_token_ids=STOPS)
    rollout = TransformersRollout(_model("llama"), PAD)
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        rollout.generate([[5], []], sampling)
    with pytest.raises(ValueError, match="1 row seeds for 2 prompts"):
        rollout.generate([[5], [6]], sampling, row_seeds=[1])


def test_no_logits_outlive_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # The removed trainer stacked them: 64 × 512 × 151,936 × 4 bytes are 20 GB.
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    step = Decoding.step

    def watched(self: Decoding, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal most
        logits = step(self, tokens)
        alive.append(weakref.ref(logits))
        most = max(most, sum(each() is not None for each in alive))
        return logits

    monkeypatch.setattr(Decoding, "step", watched)
    TransformersRollout(_model("llama"), PAD).generate(PROMPTS, Sampling(max_new_tokens=20, stop_token_ids=()))
    assert len(alive) == 19
    assert most <= 2


def test_noise_after_the_stop_token_changes_nothing() -> None:
    sampler = Sampler(Sampling(max_new_tokens=5, stop_token_ids=STOPS), 40, torch.device("cpu"))
    tokens = torch.tensor([[5, 3, PAD, PAD, PAD], [5, 6, 8, 9, 7], [5, 6, 8, 9, 10]])
    logps = torch.arange(15.0).reshape(3, 5)
    clean = cut_at_stops(tokens, logps, sampler)
    assert clean[0] == [[5, 3], [5, 6, 8, 9, 7], [5, 6, 8, 9, 10]]
    assert clean[1] == [[0, 1], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert clean[2] == [True, True, False]
    noisy, noise = tokens.clone(), logps.clone()
    noisy[0, 2:] = torch.tensor([3, 20, 11])
    noise[0, 2:] = torch.nan
    assert cut_at_stops(noisy, noise, sampler) == clean


def test_many_prompts_are_read_in_groups_and_answered_as_one_by_one() -> None:
    # 37 prompts: three groups, of unlike widths, in one cache; then rows leave it as they end.
    model = _model("llama").eval()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 40, (1 + row % 23,), generator=draw).tolist() for row in range(37)]
    sampling = Sampling(max_new_tokens=9, stop_token_ids=STOPS, forbidden_token_ids=(PAD,), temperature=0.8, seed=3)
    together = TransformersRollout(model, PAD).generate(prompts, sampling)
    alone = TransformersRollout(model, PAD, batch_size=1).generate(prompts, sampling)
    assert together.response_ids == alone.response_ids
    for prompt, reply, logps in zip(prompts, together.response_ids, together.logprobs, strict=True):
        assert logps == pytest.approx(_whole_forward_logprobs(model, prompt, reply, 0.8), abs=1e-5)


def test_under_autocast_the_cache_is_rounded_once_and_the_logits_are_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers keeps what rotary embedding leaves, float32 keys, and autocast rounds all of them at each token."""
    model = _model("llama").eval()

    def logits() -> tuple[list[torch.Tensor], torch.dtype]:
        reading = Decoding(model, PROMPTS, PAD)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            steps = [reading.prefill(), *(reading.step(torch.full((len(PROMPTS),), 9)) for _ in range(3))]
        return steps, reading.cache.layers[0].keys.dtype

    rounded, dtype = logits()
    monkeypatch.setattr(decoding, "new_cache", lambda model: (DynamicCache(config=model.config), True))
    expected, kept = logits()
    assert (dtype, kept) == (torch.bfloat16, torch.float32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rounded, expected, strict=True))
