"""What happens to a request before and after its route: request ids, logs, size limits, Azure's forms of the paths."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.registry.problems import InvalidRequestError, TooLargeError
from luthier.service.errors import error_response
from luthier.service.measures import Measures

access = logging.getLogger("luthier.access")
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is being answered, for whatever is logged meanwhile."""

MAX_JSON_BYTES = 16 * 2**20
MAX_PART_BYTES = 64 * 2**20
_ENVELOPE_BYTES = 2**20
_DEPLOYMENT = re.compile(
    r"^/openai/deployments/(.+?)/(chat/completions|completions|embeddings|images/[a-z]+|audio/[a-z]+)$"
)


class AzurePaths:
    """Azure's paths as the plain ones: /openai/v1/..., /openai/...?api-version=, /openai/deployments/{model}/..."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ("\x00" in scope["path"] or b"%00" in scope["query_string"]):
            error = InvalidRequestError("The URL holds a NUL, which no name here has.", code="invalid_url")
            await error_response(error)(scope, receive, send)
            return
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
            await self._refuse(limit, scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                await _drain(receive, limit)
                raise _BodyTooLargeError(413, _too_large(limit).message)
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        await _drain(receive, limit)
        await error_response(_too_large(limit))(scope, receive, send)


class _BodyTooLargeError(HTTPException):
    """An HTTPException, so that whoever reads the body lets it pass."""


async def _drain(receive: Receive, limit: int) -> None:
    """Read on and throw away, for a client that is still sending would not hear the answer; not without end."""
    drained = 0
    while drained < limit * 4:
        message = await receive()
        drained += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def _too_large(limit: int) -> TooLargeError:
    size = f"{max(1, limit // 2**20)} MB"
    return TooLargeError(
        f"The request is larger than {size}. Send files in parts (uploads), or split them.", code="request_too_large"
    )


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
        _request_id.set(request_id)
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
        if (request_id := _request_id.get()) is not None:
            line["request_id"] = request_id
        line |= {key: value for key, value in vars(record).items() if key not in self._KNOWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
