"""A client of ``vllm serve``: the few endpoints that a rollout needs, on the standard library.

Written to the documentation of vLLM 0.22 to 0.28: "OpenAI-Compatible Server" (``/v1/completions`` with vLLM's extra
parameters, ``return_token_ids`` since 0.10.2), "LoRA Adapters" (``/v1/load_lora_adapter`` and its twin, open where
the server has ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``), ``/health`` and ``/v1/models``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from chatalign.errors import RolloutError
from chatalign.rollout.vllm_replies import Reply

_CONNECTIONS = 64
_SECONDS_BETWEEN_LOOKS = 0.5
START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank R "
    "--logprobs-mode processed_logprobs"
)


class VllmClient:
    """One server. Every method raises RolloutError, in one line, where it doesn't answer as documented.

    `timeout_s` is how long the server may take to come up, and to answer any one request. Requests go straight
    there, whatever proxy the environment names. ``VLLM_API_KEY``, the server's own variable, is sent where it is set.
    """

    def __init__(self, base_url: str, *, timeout_s: float) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self._opener = build_opener(ProxyHandler({}))

    def wait_until_up(self) -> None:
        """Return once ``/health`` answers."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                self._call("/health")
                return
            except RolloutError as error:
                if time.monotonic() + _SECONDS_BETWEEN_LOOKS > deadline:
                    raise RolloutError(
                        f"{self.base_url}: no vLLM server after {self.timeout_s:g} s ({_reason(error)}); "
                        f"start it ({START}), or set `ppo.vllm_server_base_url`"
                    ) from None
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def base_model(self) -> dict[str, Any]:
        """The card of the model that is served without an adapter: ``id``, ``root``, ``max_model_len``."""
        cards = self._json("/v1/models", None).get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise RolloutError(f"{self.base_url}/v1/models: lists no models; is this a vLLM server?")
        bases = [card for card in cards if card.get("parent") is None]
        if not bases:
            raise RolloutError(f"{self.base_url}/v1/models: serves no base model; start it again ({START})")
        return bases[0]

    def load_adapter(self, name: str, folder: Path) -> None:
        """Have the server read the adapter in `folder`, a path on a disk that both see, as model `name`."""
        mend = f"start it as {START} where it can read that folder"
        self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, mend=mend)

    def unload_adapter(self, name: str) -> None:
        """Drop adapter `name`."""
        self._call("/v1/unload_lora_adapter", {"lora_name": name})

    def complete_all(
        self, model: str, prompt_ids: Sequence[Sequence[int]], fields: Sequence[Mapping[str, Any]]
    ) -> list[Reply]:
        """One reply a prompt, in order; a request each, since a request has one seed for all of its prompts."""
        pool = ThreadPoolExecutor(max_workers=min(_CONNECTIONS, len(prompt_ids)))
        try:
            asked = [pool.submit(self._complete, model, ids, own) for ids, own in zip(prompt_ids, fields, strict=True)]
            return [each.result() for each in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, model: str, prompt_ids: Sequence[int], fields: Mapping[str, Any]) -> Reply:
        request = {"model": model, "prompt": [list(prompt_ids)], "return_token_ids": True, **fields}
        answer = self._json("/v1/completions", request)
        where = f"{self.base_url}/v1/completions"
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1:
            found = len(choices) if isinstance(choices, list) else "no"
            raise RolloutError(f"{where}: gave {found} replies to 1 prompt; is this a vLLM server?")
        token_ids, logprobs = choices[0].get("token_ids"), (choices[0].get("logprobs") or {}).get("token_logprobs")
        if not isinstance(token_ids, list):
            raise RolloutError(f"{where}: a reply has no `token_ids`; use vLLM 0.22 or later")
        if not isinstance(logprobs, list) or not all(isinstance(value, int | float) for value in logprobs):
            raise RolloutError(
                f"{where}: a reply has no log-probabilities; start vLLM with --logprobs-mode processed_logprobs"
            )
        return Reply(token_ids=token_ids, logprobs=logprobs, finish_reason=choices[0].get("finish_reason"))

    def _json(self, path: str, payload: Mapping[str, Any] | None) -> dict[str, Any]:
        body = self._call(path, payload)
        try:
            answer = json.loads(body)
        except ValueError:
            raise RolloutError(
                f"{self.base_url}{path}: the answer of {len(body)} bytes is no whole JSON; look at vLLM's log"
            ) from None
        if not isinstance(answer, dict):
            raise RolloutError(f"{self.base_url}{path}: the answer is no JSON object; is this a vLLM server?")
        return answer

    def _call(self, path: str, payload: Mapping[str, Any] | None = None, *, mend: str = "look at vLLM's log") -> bytes:
        """GET, or POST where there is a payload; the body of an answer with status 200."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if payload is None else json.dumps(payload).encode()
        url = self.base_url + path
        try:
            with self._opener.open(Request(url, data, headers), timeout=self.timeout_s) as response:
                body: bytes = response.read()
                return body
        except HTTPError as error:
            raise RolloutError(f"{url}: HTTP {error.code}, {_said(error)}; {mend}") from error
        except TimeoutError as error:
            raise RolloutError(
                f"{url}: no answer within {self.timeout_s:g} s; raise `ppo.vllm_server_timeout`, or look at vLLM's log"
            ) from error
        except URLError as error:
            # A time-out while connecting comes wrapped.
            raise RolloutError(f"{url}: can't be reached ({error.reason}); start the server ({START})") from error
        except (HTTPException, OSError) as error:
            raise RolloutError(f"{url}: the connection broke ({error!r}); look at vLLM's log") from error


def _reason(error: RolloutError) -> object:
    """What went wrong below an error of this module, without its advice."""
    return getattr(error.__cause__, "reason", error.__cause__) or error


def _said(error: HTTPError) -> str:
    """The message of a refusal on one line: vLLM's ``error.message``, FastAPI's ``detail``, or the body."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (HTTPException, OSError):
        return "no message"
    try:
        answer = json.loads(text)
        inner = answer.get("error", answer)
        text = str(inner.get("message", inner.get("detail", text)))
    except (ValueError, AttributeError):
        pass  # not JSON of that form: the body itself is the message
    return " ".join(text.split())[:300] or "no message"
