"""A Hub of one's own: as much of its HTTP interface as fetching a model needs, serving folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """What the Hub serves and what it was asked.

    Attributes:
        models: Hub id -> the folder served under it.
        gated: Hub ids that answer that their licence was not accepted.
        requests: Every request as "METHOD path", in order.
    """

    def __init__(self, models: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.models = models
        self.gated = gated
        self.requests: list[str] = []
        self.url = ""

    def fetched(self) -> set[str]:
        """Names of the files whose contents were handed out."""
        return {line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line}


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve on a free port of this machine until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            name = path.removeprefix("/api/models").strip("/")
            hub_id = "/".join(name.split("/")[:2])
            if hub_id in hub.gated:
                self._send(403, b"", with_body, {"X-Error-Code": "GatedRepo"})
            elif hub_id not in hub.models:
                self._send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})
            elif path.startswith("/api/"):
                self._send(200, self._describe(hub_id, name), with_body, {"Content-Type": "application/json"})
            else:
                self._send_file(hub.models[hub_id] / name.split("/")[-1], with_body)

        def _describe(self, hub_id: str, name: str) -> bytes:
            files = sorted(path for path in hub.models[hub_id].iterdir() if path.is_file())
            if "/tree/" in name:
                oid = "1" * 40
                tree = [{"type": "file", "path": each.name, "size": each.stat().st_size, "oid": oid} for each in files]
                return json.dumps(tree).encode()
            siblings = [{"rfilename": each.name} for each in files]
            return json.dumps({"id": hub_id, "modelId": hub_id, "sha": COMMIT, "siblings": siblings}).encode()

        def _send_file(self, path: Path, with_body: bool) -> None:
            if not path.is_file():
                self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, with_body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _send(self, status: int, content: bytes, with_body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
