"""A stand-in for vLLM without a GPU: its own sampler, and ``vllm serve``'s endpoints around it.

It shares no code with chatalign: a whole forward pass for every token, its own masks in vLLM's documented order
(minimum length, logit bias, temperature, top-k, top-p), the exponential race for the draw. Like vLLM it keeps what
it computed of a prompt under the adapter's *name*, so an adapter that is changed in place is answered with old numbers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EOS = 3
# /v1/completions by name and JSON type (vLLM 0.22); the real one refuses a wrong type, this one a wrong name too.
FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "prompt": (list,),
    "n": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "max_tokens": (int,),
    "min_tokens": (int,),
    "stop_token_ids": (list,),
    "ignore_eos": (bool,),
    "logit_bias": (dict,),
    "seed": (int,),
    "logprobs": (int,),
    "return_token_ids": (bool,),
}
NEUTRAL = {
    "n": 1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0
}  # fmt: skip


class Refused(Exception):
    """An HTTP status and vLLM's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeEngine:
    """Draws replies from a saved model and from adapters on it."""

    def __init__(self, folder: Path | str, *, logprobs_mode: str = "raw_logprobs", max_lora_rank: int = 16) -> None:
        self.folder = folder
        self.logprobs_mode = logprobs_mode
        self.max_lora_rank = max_lora_rank
        self.base = self._read_base()
        self.adapters: dict[str, Any] = {}
        self._prefixes: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def _read_base(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def load(self, name: str, path: str) -> None:
        from peft import PeftModel

        config = json.loads(Path(path, "adapter_config.json").read_text("utf-8"))
        if config["r"] > self.max_lora_rank:
            raise Refused(500, f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.")
        self.adapters[name] = PeftModel.from_pretrained(self._read_base(), path).eval()

    def reset_prefix_cache(self) -> None:
        self._prefixes.clear()

    @torch.no_grad()
    def _logits(self, name: str, ids: list[int], *, keep: bool) -> Tensor:
        if keep and (name, tuple(ids)) in self._prefixes:
            return self._prefixes[name, tuple(ids)]
        model = self.adapters.get(name, self.base)
        logits_V: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        if keep:
            self._prefixes[name, tuple(ids)] = logits_V
        return logits_V

    def draw(self, name: str, prompt: list[int], fields: dict[str, Any]) -> tuple[list[int], list[float], str]:
        """Token ids, log-probabilities and finish reason of one reply."""
        assert {key: fields[key] for key in NEUTRAL} == NEUTRAL
        generator = torch.Generator().manual_seed(fields["seed"])
        bias = {int(token): max(-100.0, min(100.0, value)) for token, value in fields["logit_bias"].items()}
        stops = set(fields["stop_token_ids"]) | (set() if fields["ignore_eos"] else {EOS})
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < fields["max_tokens"]:
            raw_V = self._logits(name, prompt + ids, keep=not ids)
            logits_V = raw_V.clone()
            if len(ids) < fields["min_tokens"]:
                logits_V[sorted(stops)] = -torch.inf
            for token, value in bias.items():
                logits_V[token] += value
            if fields["temperature"] > 1e-5:
                logits_V = kept(logits_V / fields["temperature"], fields["top_k"], fields["top_p"])
                race_V = torch.empty(len(logits_V), dtype=torch.float64).exponential_(generator=generator)
                token = int((logits_V.double().softmax(-1) / race_V).argmax())
            else:
                token = int(logits_V.argmax())
            shown_V = logits_V if self.logprobs_mode == "processed_logprobs" else raw_V
            ids.append(token)
            logprobs.append(max(float(shown_V.log_softmax(-1)[token]), -9999.0))
            if token in stops:
                return ids, logprobs, "stop"
        return ids, logprobs, "length"


def kept(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """−inf on what top-k, then top-p leave out, found by walking down the sorted probabilities."""
    order = logits_V.argsort(descending=True).tolist()
    chosen = order[:top_k] if top_k > 0 else order
    probabilities = logits_V[chosen].softmax(-1).tolist()
    total, count = 0.0, 0
    while count < len(chosen) and (total < top_p or top_p == 1):
        total, count = total + probabilities[count], count + 1
    result_V = torch.full_like(logits_V, -torch.inf)
    result_V[chosen[:count]] = logits_V[chosen[:count]]
    return result_V


class _Http(ThreadingHTTPServer):
    request_queue_size = 256  # the default of 5 resets connections when a rollout's requests come at once


class FakeServer:
    """``vllm serve`` on a free port of the loopback; `fault` breaks /v1/completions in the way it names."""

    def __init__(
        self, folder: Path, *, logprobs_mode: str = "processed_logprobs", max_model_len: int = 512, lora: bool = True
    ) -> None:
        self.engine = FakeEngine(folder, logprobs_mode=logprobs_mode)
        self.max_model_len = max_model_len
        self.lora = lora
        self.fault: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.loaded: list[str] = []
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.http = _Http(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def get(self, path: str) -> Any:
        if path == "/health":
            return b""
        if path == "/v1/models":
            base = {"id": "base", "object": "model", "root": str(self.engine.folder), "parent": None}
            adapters = [{"id": name, "object": "model", "parent": "base"} for name in self.engine.adapters]
            return {"object": "list", "data": [*adapters, base | {"max_model_len": self.max_model_len}]}
        raise Refused(404, "Not Found")

    def post(self, path: str, request: dict[str, Any]) -> Any:
        if path == "/v1/completions":
            return self.complete(request)
        if not self.lora or path not in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            raise Refused(404, "Not Found")
        name = request["lora_name"]
        if path == "/v1/unload_lora_adapter":
            if name not in self.engine.adapters:
                raise Refused(404, f"The lora adapter '{name}' cannot be found.")
            del self.engine.adapters[name]
            return f"Success: LoRA adapter '{name}' removed successfully.".encode()
        if name in self.engine.adapters:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(request["lora_path"], "adapter_config.json").is_file():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {request['lora_path']}")
        self.engine.load(name, request["lora_path"])
        self.loaded.append(name)
        return f"Success: LoRA adapter '{name}' added successfully.".encode()

    def complete(self, request: dict[str, Any]) -> Any:
        for key, value in request.items():
            if key not in FIELDS or not isinstance(value, FIELDS[key]):
                raise Refused(400, f"1 validation error: body.{key}: {value!r}")
        if request["model"] not in self.engine.adapters and request["model"] != "base":
            raise Refused(404, f"The model `{request['model']}` does not exist.")
        vocabulary = self.engine.base.config.vocab_size
        if bad := [token for token in request["logit_bias"] if int(token) >= vocabulary]:
            raise Refused(400, f"token_id(s) {bad} in logit_bias contain out-of-vocab token ids")
        choices = []
        for prompt in request["prompt"]:
            ids, logprobs, reason = self.engine.draw(request["model"], prompt, request)
            tokens = [f"token_id:{token}" for token in ids]
            shown = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": [], "text_offset": []}
            choices.append(
                {"index": len(choices), "text": "", "logprobs": shown, "finish_reason": reason, "stop_reason": None}
                | ({"prompt_token_ids": prompt, "token_ids": ids} if request["return_token_ids"] else {})
            )
        self.asked.append(request)
        return {"id": "cmpl-1", "object": "text_completion", "model": request["model"], "choices": choices}

    def spoilt(self, answer: Any) -> bytes:
        """The answer's bytes after `fault`."""
        choice = answer["choices"][0]
        if self.fault == "few":
            answer["choices"] = []
        elif self.fault == "no logprobs":
            choice["logprobs"] = None
        elif self.fault == "no ids":
            del choice["token_ids"]
        elif self.fault == "aborted":
            choice["finish_reason"] = "abort"
        elif self.fault == "short":
            choice["token_ids"], choice["finish_reason"] = choice["token_ids"][:1], "length"
            choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:1]
        elif self.fault == "uneven":
            choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][1:]
        elif self.fault == "own stop":
            choice["finish_reason"] = "stop"
        elif self.fault == "banned":
            choice["token_ids"][0] = 0
        elif self.fault == "positive":
            choice["logprobs"]["token_logprobs"][0] = 1.5
        body = json.dumps(answer).encode()
        return body[: len(body) // 2] if self.fault == "truncated" else body


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(lambda: server.get(self.path))

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.headers = dict(self.headers)
            if self.path == "/v1/completions" and server.fault == "hang":
                server.stopping.wait(30)
                return
            if self.path == "/v1/completions" and server.fault == "drop":
                self.close_connection = True
                self.connection.close()
                return
            self.answer(lambda: server.post(self.path, request))

        def answer(self, made: Any) -> None:
            try:
                if self.path == "/v1/completions" and server.fault == "500":
                    raise Refused(500, "EngineCore encountered an issue.\nSee stack trace (above).")
                with server.lock:
                    found = made()
                body = found if isinstance(found, bytes) else None
                if body is None:
                    body = server.spoilt(found) if self.path == "/v1/completions" else json.dumps(found).encode()
                status = 200
            except Refused as error:
                message = str(error)
                inner = {"detail": message} if message == "Not Found" else {"error": {"message": message}}
                status, body = error.status, json.dumps(inner).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[FakeServer]:
    """A fake server that answers inside the block."""
    server = FakeServer(folder, **settings)
    thread = threading.Thread(target=lambda: server.http.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join(timeout=10)
