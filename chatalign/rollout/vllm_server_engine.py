"""Generation by a vLLM server that runs beside the trainer: the adapter is handed over as files, replies by HTTP."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed

from chatalign.errors import ChatalignError, RolloutError
from chatalign.rollout.interface import Rollout, Sampling
from chatalign.rollout.overrides import refuse_overridden
from chatalign.rollout.sampler import seeds_of
from chatalign.rollout.vllm_adapter import write_adapter
from chatalign.rollout.vllm_client import VllmClient
from chatalign.rollout.vllm_replies import rollout_of, sampling_fields


class VllmServerRollout:
    """`RolloutEngine` on ``vllm serve``, for a policy that is a LoRA adapter; each draw is by the weights of its time.

    ``logprobs`` are those of the distribution that was drawn from: at the temperature, without banned tokens, and
    after ``top_p``, ``top_k`` and the minimum length. `folder` is where the adapter is written for the server to read.
    Random numbers are vLLM's, seeded a reply: they depend neither on other replies nor on their order, but a GPU's
    rounding may, unless the server runs with ``VLLM_BATCH_INVARIANT=1``.
    """

    def __init__(self, model: Any, client: VllmClient, *, folder: Path, vocabulary: int, longest: int) -> None:
        """Waits for the server; RolloutError where it stays away, or has no room for `longest` tokens."""
        self.model = model
        self.client = client
        self.folder = folder
        self.vocabulary = vocabulary
        self._name, self._version = f"chatalign-{secrets.token_hex(4)}", 0
        client.wait_until_up()
        room = client.base_model().get("max_model_len")
        if isinstance(room, int) and room < longest:
            raise RolloutError(
                f"{client.base_url}: has room for {room} tokens, and a prompt with its reply may need {longest}; "
                f"start the server with --max-model-len {longest}"
            )

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, *, row_seeds: Sequence[int] | None = None
    ) -> Rollout:
        """One reply a prompt, in the prompts' order; see `RolloutEngine.generate`.

        Raises ValueError where a prompt is empty, or seeds and prompts differ in number; RolloutError where the server
        fails or answers something else than it was asked.
        """
        seeds = seeds_of(prompt_ids, row_seeds)
        fields = [sampling_fields(sampling, seed, vocabulary=self.vocabulary) for seed in seeds]
        for field in fields[:1]:
            refuse_overridden(field, getattr(self.model, "generation_config", None))
        with self._served_adapter() as name:
            return rollout_of(self.client.complete_all(name, prompt_ids, fields), sampling)

    @contextmanager
    def _served_adapter(self) -> Iterator[str]:
        """The name under which the server has the policy's present weights, for all processes of the run.

        A new name each time, rather than ``load_inplace``: vLLM finds cached prefixes by the adapter's name, and
        would go on from the old weights' keys and values.
        """
        self._version += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=self.folder.resolve()) as folder:
            name = _from_first_process(lambda: self._publish(Path(folder)))
            yield name
            _wait_for_all()
            if _rank() == 0:
                self.client.unload_adapter(name)

    def _publish(self, folder: Path) -> str:
        name = f"{self._name}-{self._version}"
        folder.chmod(0o755)  # a server of another user reads it
        write_adapter(self.model, folder)
        self.client.load_adapter(name, folder)
        return name


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _wait_for_all() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def _from_first_process(make: Any) -> str:
    """What `make` gives on the first process, on all; what it refuses is raised on all."""
    if not (distributed.is_available() and distributed.is_initialized()):
        name: str = make()
        return name
    outcome: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            outcome = [make()]
        except ChatalignError as error:
            outcome = [error]
    distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], ChatalignError):
        raise outcome[0]
    made: str = outcome[0]
    return made
