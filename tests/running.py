"""A whole service in this process: the API under uvicorn on a free port, and a worker, each in a thread."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn

from luthier.service.app import create_app
from luthier.service.context import Context
from luthier.service.settings import ServiceSettings
from luthier.store.blobs import Blobs
from luthier.store.database import open_database
from luthier.worker.served_bases import ServedBases

WORDS = ["red", "green", "blue", "warm", "cold", "bright", "dim", "lamp", "door", "fan"]
BASE = "tiny"


def chat_rows(num_rows: int, seed: int = 0) -> bytes:
    """A training file."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        words = draw.sample(WORDS, 3)
        turns = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[0]}]
        rows.append(json.dumps({"messages": turns}))
    return ("\n".join(rows) + "\n").encode()


def pair_rows(num_rows: int, seed: int = 0) -> bytes:
    """A training file of preference pairs."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        words = draw.sample(WORDS, 3)
        better, worse = ([{"role": "assistant", "content": text}] for text in (words[0], f"{words[2]} {words[1]}"))
        asked = {"messages": [{"role": "user", "content": " ".join(words)}]}
        rows.append(json.dumps({"input": asked, "preferred_output": better, "non_preferred_output": worse}))
    return ("\n".join(rows) + "\n").encode()


@dataclass
class Service:
    """A running service.

    Attributes:
        url: Without the /v1.
        keys: Tenant's name -> a key with the scopes tune and infer.
        worker: The worker, where there is one for as long as the service runs.
    """

    url: str
    context: Context
    keys: dict[str, str]
    worker: Any = None

    def tenant(self, name: str, scopes: tuple[str, ...] = ("tune", "infer"), **quotas: Any) -> str:
        """A new tenant; returns a key of it."""
        self.context.tenants.create(name, **quotas)
        _, self.keys[name] = self.context.tenants.create_key(name, scopes)
        return self.keys[name]


def make_context(folder: Path, base_folder: Path, database_url: str = "", **settings: Any) -> Context:
    """A context over a new store."""
    chosen = replace(
        ServiceSettings(
            data_folder=folder,
            database_url=database_url or f"sqlite:///{folder / 'luthier.db'}",
            storage=str(folder / "blobs"),
            bases={BASE: str(base_folder)},
            start_seconds=60.0,
            lease_seconds=5.0,
            private_webhooks=True,
        ),
        **settings,
    )
    database = open_database(chosen.database_url)
    return Context(chosen, database, Blobs(chosen.storage, dict(chosen.storage_options)), ServedBases(chosen.bases))


@contextmanager
def serving(context: Context) -> Iterator[Service]:
    """The API alone."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    # A connection that rests is not closed just when its client, which never asks twice, asks again.
    patience: dict[str, Any] = {"timeout_graceful_shutdown": 2, "timeout_keep_alive": 300}
    config = uvicorn.Config(create_app(context), log_config=None, access_log=False, **patience)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Service(f"http://127.0.0.1:{sock.getsockname()[1]}", context, {})
    finally:
        server.should_exit = True
        thread.join(15)
        sock.close()
        context.database.close()


@contextmanager
def working(context: Context, folder: Path, **options: Any) -> Iterator[Any]:
    """A worker of the base, in a thread."""
    from luthier.registry.work import StoredWork
    from luthier.worker.service_worker import ServiceWorker
    from luthier.worker.worker_options import WorkerOptions

    chosen = WorkerOptions(
        base=BASE,
        source=context.settings.bases[BASE],
        scratch=folder,
        lease_seconds=context.settings.lease_seconds,
        threads=1,
    )
    worker = ServiceWorker(StoredWork(context.database, context.blobs), context.blobs, replace(chosen, **options))
    problems: list[BaseException] = []

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:
            problems.append(error)
            raise

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(150)  # what it saves and records at its end may take it twice a minute
        assert not thread.is_alive()
        assert not problems


def post_by_hand(service: Service, key: str, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and read nothing: the connection, to be closed when the test wants it to break."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    link = socket.create_connection((host, int(port)))
    link.sendall(head.encode() + content)
    return link


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that is to come true soon."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for(job: str, client: Any, *statuses: str, seconds: float = 120.0) -> Any:
    """Poll a job until it has one of the statuses."""
    deadline = time.monotonic() + seconds
    while True:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in (statuses or ("succeeded", "failed", "cancelled")):
            return found
        assert time.monotonic() < deadline, f"{job} is still {found.status}"
        time.sleep(0.05)
