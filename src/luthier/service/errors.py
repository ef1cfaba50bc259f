"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from luthier.errors import LuthierError
from luthier.registry.problems import InvalidRequestError, RefusedError

logger = logging.getLogger("luthier.service")

NOT_SERVED = {
    "evals": "Evals are not served; a job's own evaluation stands in its `luthier.evaluation`.",
    "graders": "Graders are not served; jobs learn from examples and preferences, not from graded answers.",
    "images": "Images are not served; this service tunes and runs language models.",
    "audio": "Audio is not served; this service tunes and runs language models.",
    "videos": "Videos are not served; this service tunes and runs language models.",
    "assistants": "Assistants are not served; use chat completions.",
    "threads": "Assistants and their threads are not served; use chat completions.",
    "vector_stores": "Vector stores are not served.",
    "embeddings": "Embeddings are not served.",
    "moderations": "Moderations are not served.",
    "responses": "The Responses API is not served; use chat completions.",
    "conversations": "Conversations are not served; use chat completions.",
    "realtime": "The realtime API is not served; use chat completions with stream=true.",
    "containers": "Containers are not served.",
}
"""First part of a path (behind fine_tuning/alpha/ for graders) -> the sentence that answers it."""


def error_body(error: RefusedError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: RefusedError) -> JSONResponse:
    headers = {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Make every failure an answer in OpenAI's shape."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_from_validation(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = type("_", (RefusedError,), {"status": error.status_code})
        message = str(error.detail)
        if error.status_code == 404:
            message = not_served(request.method, request.url.path)
        elif error.status_code == 413:
            return error_response(kind(message, code="request_too_large"))
        elif error.status_code == 405:
            message = f"{request.method} is not a method of {request.url.path}."
        return error_response(kind(message, code="unknown_url" if error.status_code == 404 else None))

    @app.exception_handler(LuthierError)
    async def mendable(request: Request, error: LuthierError) -> JSONResponse:
        logger.error("request failed", extra={"problem": error.message})
        kind = type("_", (RefusedError,), {"status": 503, "type": "server_error"})
        message = "The service cannot do this just now; its operator finds the reason in the logs."
        return error_response(kind(message, retry_after_seconds=5))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        kind = type("_", (RefusedError,), {"status": 500, "type": "server_error"})
        answer = error_response(kind("The service failed; its operator finds the reason in the logs."))
        # This is answered outside of what gives the others their id.
        answer.headers["x-request-id"] = str(getattr(request.state, "request_id", ""))
        return answer


def not_served(method: str, path: str) -> str:
    """The one sentence about a path that is not served."""
    parts = [part for part in path.split("/") if part and part != "v1"]
    if parts[:2] == ["fine_tuning", "alpha"]:
        parts = ["graders"]
    return NOT_SERVED.get(parts[0] if parts else "", f"Unknown request URL: {method} {path[:200]}.")


def _from_validation(error: RequestValidationError) -> InvalidRequestError:
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place) or None
    if problem["type"] == "extra_forbidden":
        return InvalidRequestError(
            f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter"
        )
    if problem["type"] == "missing":
        return InvalidRequestError(f"Missing required parameter: '{param}'.", param=param, code="missing_parameter")
    if problem["type"].startswith("json_invalid"):
        return InvalidRequestError("The body is not valid JSON.", code="invalid_json")
    found = "" if problem.get("input") is None else f" Found {str(problem['input'])[:100]!r}."
    message = str(problem["msg"]).removeprefix("Value error, ")
    return InvalidRequestError(f"Invalid '{param}': {message}.{found}" if param else f"{message}.", param=param)
