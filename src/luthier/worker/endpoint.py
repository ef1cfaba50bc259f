"""The worker's HTTP endpoint: requests to sample in, lines of JSON out. It runs in a thread beside the base's.

POST /v1/sample     a SampleRequest -> SampleEvents, one JSON a line
POST /v1/predict    a PredictRequest -> Predictions
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from luthier.errors import LuthierError
from luthier.registry.problems import RefusedError
from luthier.registry.seam import Predictions, PredictRequest, SampleEvent, SampleRequest
from luthier.worker.replies import MAX_WAITING, Task, one_line

LISTEN_SECONDS = 0.5
"""How often it is looked whether the caller of a prediction is still there."""
_NOTHING = asdict(SampleEvent())


class Desk(Protocol):
    """What the endpoint asks of the worker. All verbs may be called from any thread."""

    @property
    def num_open(self) -> int:
        """Requests that are being answered or wait."""

    def make(self, request: SampleRequest, emit: Callable[[SampleEvent], None]) -> Task:
        """Prepare a request; raises LuthierError."""

    def submit(self, task: Task) -> None:
        """Let the thread that runs the base take it in."""

    def predict(self, request: PredictRequest, is_gone: threading.Event) -> Predictions:
        """What a tuned model makes of rows; raises LuthierError. Ends early once the caller is gone."""


class Endpoint:
    """Serves in a thread until `close`.

    Args:
        secret: What callers must show.
        host, port: Where to listen; port 0 takes a free one.
    """

    def __init__(self, desk: Desk, secret: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self._desk = desk
        self._secret = secret
        self._socket = socket.socket()
        self._socket.bind((host, port))
        self.port = int(self._socket.getsockname()[1])
        routes = [
            Route("/v1/sample", self._sample, methods=["POST"]),
            Route("/v1/predict", self._predict, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="endpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop taking requests; open streams have a moment to end."""
        self._server.should_exit = True
        self._thread.join(5.0)
        self._socket.close()

    def _refusal(self, request: Request) -> Response | None:
        shown = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(shown, f"Bearer {self._secret}".encode()):
            return PlainTextResponse("wrong secret", 401)
        if self._desk.num_open >= MAX_WAITING:
            return PlainTextResponse("too many requests wait already", 429, {"retry-after": "2"})
        return None

    async def _sample(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        values = await request.json()
        wanted = SampleRequest(**{**values, "stop": tuple(values["stop"])})
        events: asyncio.Queue[SampleEvent] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: SampleEvent) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            task = await run_in_threadpool(self._desk.make, wanted, emit)
        except LuthierError as error:
            return PlainTextResponse(one_line(error), 400)
        self._desk.submit(task)
        return StreamingResponse(_lines(task, events), media_type="application/x-ndjson")

    async def _predict(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        wanted, is_gone = PredictRequest(**await request.json()), threading.Event()
        watching = asyncio.create_task(_watch(request, is_gone))
        try:
            return JSONResponse(asdict(await run_in_threadpool(self._desk.predict, wanted, is_gone)))
        except RefusedError as error:
            return PlainTextResponse(error.message, error.status)
        except LuthierError as error:
            return PlainTextResponse(one_line(error), 400)
        finally:
            watching.cancel()


async def _watch(request: Request, is_gone: threading.Event) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(LISTEN_SECONDS)
    is_gone.set()


async def _lines(task: Task, events: asyncio.Queue[SampleEvent]) -> AsyncIterator[bytes]:
    left = task.request.num_choices
    try:
        while left:
            event = await events.get()
            values = {name: value for name, value in asdict(event).items() if value != _NOTHING[name]}
            yield json.dumps(values).encode() + b"\n"
            left = 0 if event.problem else left - (event.finish_reason is not None)
    finally:
        task.is_gone = left > 0
