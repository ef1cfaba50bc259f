"""What happens to a request before and after its route: request ids, logs, size limits, Azure's forms of the paths."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.registry.problems import TooLargeError
from luthier.service.errors import error_response
from luthier.service.measures import Measures

access = logging.getLogger("luthier.access")

MAX_JSON_BYTES = 16 * 2**20
MAX_PART_BYTES = 64 * 2**20
_ENVELOPE_BYTES = 2**20
_DEPLOYMENT = re.compile(r"^/openai/deployments/(.+?)/(chat/completions|completions)$")


class AzurePaths:
    """Azure's paths as the plain ones: /openai/v1/..., /openai/...?api-version=, /openai/deployments/{model}/..."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/openai/"):
            scope = dict(scope)
            path: str = scope["path"]
            if found := _DEPLOYMENT.match(path):
                scope["deployment"] = unquote(found[1])
                path = f"/v1/{found[2]}"
            elif path.startswith("/openai/v1/"):
                path = path.removeprefix("/openai")
            else:
                path = "/v1/" + path.removeprefix("/openai/")
            scope["path"], scope["raw_path"] = path, path.encode()
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large, in words that the client receives: the rest is read and thrown away.

    Args:
        max_file_bytes: For a file; parts of uploads and JSON have fixed limits.
    """

    def __init__(self, app: ASGIApp, max_file_bytes: int) -> None:
        self.app = app
        self.max_file_bytes = max_file_bytes

    def _limit(self, path: str) -> int:
        if path == "/v1/files":
            return self.max_file_bytes + _ENVELOPE_BYTES
        if re.fullmatch(r"/v1/uploads/[^/]+/parts", path):
            return MAX_PART_BYTES + _ENVELOPE_BYTES
        return MAX_JSON_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            await self._refuse(limit, limit * 4, scope, receive, send)
            return
        size = 0
        has_begun = False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _BodyTooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _BodyTooLargeError:
            if not has_begun:
                await self._refuse(limit, limit * 4, scope, receive, send)

    async def _refuse(self, limit: int, drain_bytes: int, scope: Scope, receive: Receive, send: Send) -> None:
        drained = 0
        while drained < drain_bytes:
            message = await receive()
            drained += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        error = TooLargeError(
            f"The request is larger than {(limit // 2**20) or 1} MB. Send files in parts (uploads), or split them.",
            code="request_too_large",
        )
        await error_response(error)(scope, receive, send)


class _BodyTooLargeError(Exception):
    pass


class RequestLog:
    """Gives each request an id, counts it, and writes one structured line. Bodies and keys are never logged."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self.app = app
        self.measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 499  # the client went away before an answer

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = f"{(time.perf_counter() - started) * 1000:.0f}"
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", took.encode()),
                ]
            await send(message)

        try:
            await self.app(scope, receive, marked)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self.measures.count_request(scope["method"], route, status, seconds)
            access.info(
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(seconds, 4),
                    "tenant": scope["state"].get("tenant"),
                },
            )


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    _KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in self._KNOWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
