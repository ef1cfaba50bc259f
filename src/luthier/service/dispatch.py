"""From a request to a reply: find a live worker of the base, post it there, and hand on what streams back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import httpx
from starlette.concurrency import run_in_threadpool

from luthier.registry.jobs import want_base
from luthier.registry.placement import live_workers, why_not_held
from luthier.registry.problems import InvalidRequestError, MissingError, QuotaError, RefusedError, UnavailableError
from luthier.registry.seam import Predictions, PredictRequest, SampleEvent, SampleRequest
from luthier.store.database import Database
from luthier.store.held_base import HeldBase
from luthier.store.tables import Worker

_POLL_SECONDS = 0.25
_REPLY_SECONDS = 600.0
_PROBLEMS: dict[int, type[RefusedError]] = {400: InvalidRequestError, 404: MissingError, 429: QuotaError}


class Dispatcher:
    """Sends requests to workers.

    Args:
        database: Where live workers are found.
        start_seconds: How long to wait for one before giving up.
    """

    def __init__(self, database: Database, start_seconds: float) -> None:
        self._database = database
        self._start_seconds = start_seconds
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def sample(self, base: HeldBase, request: SampleRequest) -> AsyncIterator[SampleEvent]:
        """The reply's events as they come. Closing the iterator ends the reply at the worker.

        Raises:
            RefusedError: what the worker refused, or nobody there to ask.
        """
        async with self._post(base, "/v1/sample", asdict(request), request.adapter or "") as response:
            has_begun = False
            try:
                async for line in response.aiter_lines():
                    if not line:
                        continue
                    event = SampleEvent(**json.loads(line))
                    if event.problem:
                        raise _problem(event.status, event.problem)
                    has_begun = True
                    yield event
            except httpx.HTTPError as error:
                raise UnavailableError(
                    "The worker went away in the middle of the reply. Send the request again."
                    if has_begun
                    else "The worker went away. Send the request again.",
                    code="worker_lost",
                    retry_after_seconds=5,
                ) from error

    async def predict(self, base: HeldBase, request: PredictRequest) -> Predictions:
        """What a tuned model makes of rows.

        Raises:
            RefusedError: what the worker refused, or nobody there to ask.
        """
        async with self._post(base, "/v1/predict", asdict(request), request.adapter or "") as response:
            return Predictions(**json.loads(await response.aread()))

    def _post(self, base: HeldBase, path: str, body: dict[str, Any], adapter: str) -> _Posted:
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            timeout = httpx.Timeout(_REPLY_SECONDS, connect=3.0)
            self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        return _Posted(self, self._client, base, path, body, adapter)

    async def workers(self, base: HeldBase, adapter: str) -> list[Worker]:
        """Live workers that hold this, the one that probably has the adapter already first.

        Raises:
            UnavailableError: when there is none and none comes in time.
        """
        deadline = time.monotonic() + self._start_seconds
        is_noted = False
        while True:
            found = await run_in_threadpool(self._look_up, base, is_noted)
            if found:
                return sorted(found, key=lambda w: hashlib.sha256(f"{w.id}{adapter}".encode()).digest())
            is_noted = True
            if time.monotonic() >= deadline:
                why = await run_in_threadpool(self._why_not, base)
                raise UnavailableError(
                    f"No worker holds {base} yet: {why}."
                    if why
                    else f"No worker holds {base} yet; one has been asked for. Try again soon.",
                    code="base_not_loaded",
                    retry_after_seconds=10,
                )
            await asyncio.sleep(_POLL_SECONDS)

    def _why_not(self, base: HeldBase) -> str:
        with self._database.reading() as session:
            return why_not_held(session, base, self._database.now(session))

    def _look_up(self, base: HeldBase, is_noted: bool) -> list[Worker]:
        with self._database.reading() as session:
            found = live_workers(session, base, self._database.now(session))
        if not found and not is_noted:
            with self._database.writing() as session:
                want_base(session, base, self._database.now(session))
        return found


class _Posted:
    """A request under way: `async with` gives the response of the first worker that takes it."""

    def __init__(
        self,
        owner: Dispatcher,
        client: httpx.AsyncClient,
        base: HeldBase,
        path: str,
        body: dict[str, Any],
        adapter: str,
    ) -> None:
        self._owner = owner
        self._client = client
        self._base, self._path, self._body, self._adapter = base, path, body, adapter
        self._response: httpx.Response | None = None

    async def __aenter__(self) -> httpx.Response:
        last: RefusedError | None = None
        for _ in range(3):
            for worker in await self._owner.workers(self._base, self._adapter):
                try:
                    request = self._client.build_request(
                        "POST",
                        worker.address + self._path,
                        json=self._body,
                        headers={"authorization": f"Bearer {worker.secret}"},
                    )
                    response = await self._client.send(request, stream=True)
                except httpx.TransportError:
                    continue  # it died, and its lease has not run out yet
                if response.status_code == 200:
                    self._response = response
                    return response
                await response.aread()
                text, status = response.text, response.status_code
                retry_after = response.headers.get("retry-after")
                await response.aclose()
                if status in (429, 503, 401):
                    last = _problem(status, text or "busy", float(retry_after or 2))
                    continue
                raise _problem(status, text)
            await asyncio.sleep(1.0)
        raise last or UnavailableError(
            f"No worker of {self._base} answers. Try again soon.", code="worker_lost", retry_after_seconds=10
        )

    async def __aexit__(self, *_: object) -> None:
        if self._response is not None:
            await self._response.aclose()


def _problem(status: int, message: str, retry_after: float | None = None) -> RefusedError:
    kind = _PROBLEMS.get(status, UnavailableError)
    return kind(message, retry_after_seconds=retry_after)
