"""The part of the ``vllm`` package that a colocated engine uses, with vLLM's documented names, on `FakeEngine`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from rollout.fake_vllm import FakeEngine


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Served:
    """A vLLM model: takes weights by their Hugging Face names."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def load_weights(self, weights: Any) -> set[str]:
        own = dict(self.model.named_parameters())
        loaded = set()
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            loaded.add(name)
        return loaded


class LLM:
    """Every instance made is in `made`; raises what `refusal` holds."""

    made: list[LLM] = []
    refusal: Exception | None = None

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        enable_sleep_mode: bool = False,
        skip_tokenizer_init: bool = False,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        logprobs_mode: str = "raw_logprobs",
        distributed_executor_backend: str | None = None,
    ) -> None:
        if LLM.refusal is not None:
            raise LLM.refusal
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        self.settings = {key: value for key, value in locals().items() if key != "self"}
        self.launcher = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        self.engine = FakeEngine(model, logprobs_mode=logprobs_mode, max_lora_rank=max_lora_rank)
        self.asleep = False
        self.calls: list[str] = []
        self.numbers: dict[int, str] = {}
        LLM.made.append(self)

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert not self.asleep
        self.calls.append("generate")
        name = "base"
        if lora_request is not None:
            assert self.settings["enable_lora"]
            # vLLM knows an adapter by its number: a number that it has seen is not read again.
            name = self.numbers.setdefault(lora_request.lora_int_id, lora_request.lora_name)
            if name not in self.engine.adapters:
                self.engine.load(name, lora_request.lora_path)
        outputs = []
        for row, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            ids, logprobs, reason = self.engine.draw(name, prompt["prompt_token_ids"], vars(params))
            steps = [{token: Logprob(value, rank=1)} for token, value in zip(ids, logprobs, strict=True)]
            reply = CompletionOutput(0, "", ids, steps if params.logprobs is not None else None, reason)
            outputs.append(RequestOutput(str(row), prompt["prompt_token_ids"], [reply]))
        return outputs

    def sleep(self, level: int = 1) -> None:
        assert self.settings["enable_sleep_mode"]
        self.asleep = True
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert self.settings["enable_sleep_mode"]
        self.asleep = False
        self.calls.append("wake_up")

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        # A function that holds weights isn't sent to another process.
        assert self.settings["distributed_executor_backend"] == "external_launcher"
        assert not self.asleep
        self.calls.append("apply_model")
        return [func(Served(self.engine.base))]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        self.engine.reset_prefix_cache()
        return True


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Put the fake where ``import vllm`` finds it."""
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "refusal", None)
    return LLM
