"""Generation by vLLM in the trainer's own process, on the trainer's own GPU.

Written to the documentation of vLLM 0.22 to 0.28: ``LLM`` (``generate``, ``sleep``, ``wake_up``, ``apply_model``,
``reset_prefix_cache``), ``SamplingParams``, ``LoRARequest``, "Sleep Mode".
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatalign.errors import DependencyError, RolloutError
from chatalign.rollout.interface import Rollout, Sampling
from chatalign.rollout.sampler import seeds_of
from chatalign.rollout.vllm_adapter import ADAPTER, lora_rank, write_adapter
from chatalign.rollout.vllm_replies import Reply, rollout_of, sampling_fields


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """How ``vllm.LLM`` is built; names as there."""

    model: str
    revision: str | None
    dtype: str
    max_model_len: int
    gpu_memory_utilization: float
    tensor_parallel_size: int
    enable_sleep_mode: bool
    seed: int


class VllmColocateRollout:
    """`RolloutEngine` on ``vllm.LLM``; each draw is by the policy's weights of its time.

    An adapter is handed over as files, under a new name and number each time: vLLM finds adapters by number and cached
    prefixes by name. All weights are copied in memory. ``logprobs`` and random numbers are as `VllmServerRollout` says.
    Under sleep mode, vLLM's weights wait in the CPU's memory and its cache is given up between two draws.
    """

    def __init__(self, model: Any, settings: VllmSettings, *, vocabulary: int, processes: int) -> None:
        """Loads the base; DependencyError without vllm, RolloutError where vLLM refuses the model or the memory."""
        vllm = _vllm()
        self.model = model
        self.vocabulary = vocabulary
        self.sleeps = settings.enable_sleep_mode
        self.is_adapter = hasattr(model, "peft_config")
        self._version = 0
        # Weights can be copied, and several processes have an engine each, only where vLLM starts no process itself.
        here = processes > 1 or not self.is_adapter
        if here and settings.tensor_parallel_size > 1:
            raise RolloutError(
                "`ppo.vllm_tensor_parallel_size` above 1 needs one training process and a `lora` section; set it to 1, "
                "or use `ppo.rollout_engine: vllm_server`"
            )
        options: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if here else {}
        if self.is_adapter:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(model.peft_config[ADAPTER])}
        try:
            with _launcher_variables() if here else nullcontext():
                self.llm = vllm.LLM(
                    **vars(settings), logprobs_mode="processed_logprobs", skip_tokenizer_init=True, **options
                )
        except (ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RolloutError(
                f"{settings.model}: vLLM doesn't load it ({reason}); lower `ppo.vllm_gpu_memory_utilization` where "
                f"memory is short, or set `ppo.rollout_engine: transformers`"
            ) from error
        self._sleep()

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, *, row_seeds: Sequence[int] | None = None
    ) -> Rollout:
        """One reply a prompt, in the prompts' order; see `RolloutEngine.generate`.

        Raises ValueError where a prompt is empty, or seeds and prompts differ in number; RolloutError where vLLM
        answers something else than it was asked.
        """
        seeds = seeds_of(prompt_ids, row_seeds)
        vllm = _vllm()
        params = [
            vllm.SamplingParams(**sampling_fields(sampling, seed, vocabulary=self.vocabulary), detokenize=False)
            for seed in seeds
        ]
        if self.sleeps:
            self.llm.wake_up()
        device = next(self.model.parameters()).device.type
        # The trainer's autocast would reach into an engine of the same process.
        with torch.autocast(device_type=device, enabled=False), self._present_weights() as lora_request:
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompt_ids],
                params,
                lora_request=lora_request,
                use_tqdm=False,
            )
        self._sleep()
        if len(outputs) != len(prompt_ids):
            raise RolloutError(f"vLLM gave {len(outputs)} replies to {len(prompt_ids)} prompts; look at vLLM's log")
        return rollout_of([_reply(output.outputs[0]) for output in outputs], sampling)

    @contextmanager
    def _present_weights(self) -> Iterator[Any]:
        """Bring vLLM to the policy's weights; the ``LoRARequest`` to generate with, or None."""
        if not self.is_adapter:
            weights = [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]
            self.llm.apply_model(lambda served: _load(served, weights))
            self.llm.reset_prefix_cache()
            yield None
            return
        from vllm.lora.request import LoRARequest

        self._version += 1
        with tempfile.TemporaryDirectory(prefix="chatalign-adapter-") as folder:
            write_adapter(self.model, Path(folder))
            yield LoRARequest(lora_name=f"chatalign-{self._version}", lora_int_id=self._version, lora_path=folder)

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)


def _load(served: Any, weights: list[tuple[str, torch.Tensor]]) -> None:
    served.load_weights(iter(weights))


def _reply(output: Any) -> Reply:
    """A ``CompletionOutput`` as a `Reply`."""
    token_ids = list(output.token_ids)
    if output.logprobs is None:
        raise RolloutError("vLLM's reply has no log-probabilities; use vLLM 0.22 or later")
    chosen = zip(token_ids, output.logprobs, strict=True)
    logprobs = [float(step[token].logprob) for token, step in chosen]
    return Reply(token_ids=token_ids, logprobs=logprobs, finish_reason=output.finish_reason)


def _vllm() -> Any:
    try:
        import vllm
    except ImportError:
        raise DependencyError("`ppo.rollout_engine: vllm_colocate` needs vllm; pip install 'chatalign[vllm]'") from None
    return vllm


@contextmanager
def _launcher_variables() -> Iterator[None]:
    """What vLLM's ``external_launcher`` reads of a launcher, set where none did, and gone afterwards.

    Gone, since a later stage of the same process would take itself for one of several.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    added = [name for name in alone if name not in os.environ]
    os.environ.update({name: alone[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
