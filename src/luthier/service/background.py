"""What an API process does beside answering: runs batches, sends webhooks, sweeps what has expired."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

import httpx
from starlette.concurrency import run_in_threadpool

from luthier.registry.webhooks import AddressError, Waiting, permitted_address, sign
from luthier.service.batch_runner import BatchRunner
from luthier.service.context import Context

logger = logging.getLogger("luthier.service")

POLL_SECONDS = 1.0
SWEEP_SECONDS = 60.0
WEBHOOK_SECONDS = 10.0


class Background:
    """The loops. Each goes on after a failure, which is logged."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        runner = BatchRunner(self._context)

        async def batches() -> None:
            while await runner.run_one():
                pass

        async def sweep() -> None:
            await run_in_threadpool(self._context.files.sweep)

        loops: tuple[tuple[Callable[[], Awaitable[None]], float], ...] = (
            (batches, POLL_SECONDS),
            (self.deliver, POLL_SECONDS),
            (sweep, SWEEP_SECONDS),
        )
        self._tasks = [asyncio.create_task(_repeat(work, seconds)) for work, seconds in loops]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def deliver(self) -> None:
        """Send the webhooks that are due."""
        for waiting in await run_in_threadpool(self._context.webhooks.take_due):
            problem = await self._send(waiting)
            await run_in_threadpool(self._context.webhooks.settle, waiting.id, problem)

    async def _send(self, waiting: Waiting) -> str | None:
        may_be_private = self._context.webhooks.may_be_private
        try:
            address = await run_in_threadpool(permitted_address, waiting.url, may_be_private)
        except AddressError as error:
            return f"the url {error}"
        timestamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "webhook-id": waiting.event,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(waiting.secret, waiting.event, timestamp, waiting.body),
        }
        request = pinned_request(waiting.url, address, headers, waiting.body)
        try:
            async with httpx.AsyncClient(timeout=WEBHOOK_SECONDS, follow_redirects=False, trust_env=False) as client:
                response = await client.send(request)
        except httpx.HTTPError as error:
            return type(error).__name__
        return None if response.is_success else f"answered {response.status_code}"


def pinned_request(url: str, address: str | None, headers: dict[str, str], body: str) -> httpx.Request:
    """A POST that connects to `address`, whatever the URL's name means by now; the certificate is still the name's."""
    timeout = {"timeout": httpx.Timeout(WEBHOOK_SECONDS).as_dict()}
    if address is None:
        return httpx.Request("POST", url, content=body, headers=headers, extensions=timeout)
    named = httpx.URL(url)
    host = {"host": named.netloc.decode("ascii")}
    extensions = {**timeout, "sni_hostname": named.raw_host.decode("ascii")}
    at_address = named.copy_with(host=address)
    return httpx.Request("POST", at_address, content=body, headers=headers | host, extensions=extensions)


async def _repeat(work: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        try:
            await work()
        except Exception:
            logger.exception("a background loop failed; it goes on")
        await asyncio.sleep(seconds)
