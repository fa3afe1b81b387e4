"""A stand-in for the Hub on loopback: the endpoints that huggingface_hub's client calls to upload, and what arrived."""

from __future__ import annotations

import base64
import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer(ThreadingHTTPServer):
    """Keeps what arrived: `repos`, `files` of the last commit by name, `tokens`; answers `fail_with` where set.

    `faults` are statuses that its next answers have; `cut_uploads` of files end half-way, the connection closed. It
    takes requests to a path that holds `silent_at` and never answers them.
    """

    def __init__(
        self,
        *,
        fail_with: int | None = None,
        faults: tuple[int, ...] = (),
        cut_uploads: int = 0,
        silent_at: str | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fail_with = fail_with
        self.faults = list(faults)
        self.cut_uploads = cut_uploads
        self.silent_at, self.closed = silent_at, threading.Event()
        self.repos: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.commits: list[str] = []
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet where a client has gone, or the test is over."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def __exit__(self, *exception: object) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_POST(self) -> None:
        body = self._begin()
        if self.server.fail_with:
            return self._answer({"error": "refused by the test"}, status=self.server.fail_with)
        if self.server.faults:
            return self._answer({"error": "a fault by the test"}, status=self.server.faults.pop(0))
        if self.path == "/api/repos/create":
            made = json.loads(body)
            made.setdefault("private", made.get("visibility") == "private")  # older clients send it themselves
            self.server.repos.append(made)
            owner = made.get("organization", "someone")
            return self._answer({"url": f"{self.server.url}/{owner}/{made['name']}"})
        if self.path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            answers = [o | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in objects]
            return self._answer({"transfer": "basic", "objects": answers})
        if "/commit/" in self.path:
            return self._commit([json.loads(line) for line in body.splitlines()])
        return self._answer({"error": "no such endpoint"}, status=404)

    def do_PUT(self) -> None:
        if self.server.cut_uploads:
            self.server.cut_uploads -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.server.objects[self.path.rpartition("/")[2]] = self._begin()
        self._answer({})

    def do_GET(self) -> None:
        self._begin()
        self._answer({"error": "refused by the test"}, status=self.server.fail_with or 404)

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
        repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        url = f"{self.server.url}/{repo}/commit/{'1' * 40}"
        self._answer({"commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""})

    def _begin(self) -> bytes:
        if self.server.silent_at is not None and self.server.silent_at in self.path:
            self.server.closed.wait()
            raise ConnectionAbortedError("the test is over")
        self.server.requests.append(f"{self.command} {self.path}")
        if not self.path.startswith("/lfs/"):
            self.server.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: dict[str, Any], *, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the test reads `requests`."""
