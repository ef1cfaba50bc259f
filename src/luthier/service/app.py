"""The API as one ASGI application. It loads no torch, and starts in a moment."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from luthier.service.background import Background
from luthier.service.context import Context
from luthier.service.errors import add_error_handlers
from luthier.service.routes import admin, batches, chat, files, health, jobs, models
from luthier.service.wire import AzurePaths, BodyLimit, RequestLog


def create_app(context: Context, *, runs_background: bool = True) -> FastAPI:
    """The application over a context.

    Args:
        runs_background: Whether this process also runs batches, sends webhooks and sweeps what has expired.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        background = Background(context)
        if runs_background:
            background.start()
        yield
        await background.stop()
        await context.dispatcher.close()

    app = FastAPI(
        title="Luthier",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.state.context = context
    logging.getLogger("uvicorn.access").disabled = True  # it writes whole paths; our own log writes routes
    add_error_handlers(app)
    # The models' routes end in a free path, so those of fine-tuning, whose names have colons too, come first.
    for router in (files.router, jobs.router, chat.router, batches.router, admin.router, models.router):
        app.include_router(router)
    app.include_router(health.router)
    app.add_middleware(BodyLimit, max_file_bytes=context.settings.max_file_bytes)
    app.add_middleware(AzurePaths)
    app.add_middleware(RequestLog, measures=context.measures)
    _describe_errors(app)
    return app


def _describe_errors(app: FastAPI) -> None:
    """Put the one shape of errors into the OpenAPI document, in place of FastAPI's own for 422, which is never sent."""
    make = app.openapi

    def described() -> dict:  # type: ignore[type-arg]
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        text = {"type": ["string", "null"]}
        inner = {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text},
        }
        schemas["Error"] = {"type": "object", "required": ["error"], "properties": {"error": inner}}
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, verbs in document["paths"].items():
            for verb in verbs.values():
                verb.get("responses", {}).pop("422", None)
                if path.startswith("/v1"):
                    verb["security"] = [{"key": []}]
        return document

    app.openapi = described  # type: ignore[method-assign]
