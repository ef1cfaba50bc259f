"""Chat, plain completions, and what tuned models make of rows of their task."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from luthier.registry.problems import InvalidRequestError
from luthier.registry.seam import PredictRequest
from luthier.service.auth import ContextDep, Inferrer
from luthier.service.bodies import ChatCreate, CompletionCreate, PredictCreate
from luthier.service.chat import Answering, chat_answer, completion_answer, filter_prompt, find_model
from luthier.service.routes.common import ERRORS, V1

router = APIRouter(prefix=V1, responses=ERRORS, tags=["inference"])
Result = TypeVar("Result")

LISTEN_SECONDS = 0.5
"""How often it is looked whether the caller of a whole reply is still there."""


@router.post("/chat/completions")
async def create_chat(body: ChatCreate, caller: Inferrer, context: ContextDep, request: Request) -> Response:
    """Go on with a conversation."""
    answer = await run_in_threadpool(chat_answer, context, caller, body)
    return await _answer(request, answer, body.stream, body.wants_usage)


@router.post("/completions")
async def create_completion(
    body: CompletionCreate, caller: Inferrer, context: ContextDep, request: Request
) -> Response:
    """Go on with a text."""
    answer = await run_in_threadpool(completion_answer, context, caller, body)
    return await _answer(request, answer, body.stream, body.wants_usage)


@router.post("/luthier/predict")
async def create_prediction(
    body: PredictCreate, caller: Inferrer, context: ContextDep, request: Request
) -> dict[str, Any]:
    """What a tuned model makes of rows: a label, entities, a translation, or whatever its task gives."""
    model = await run_in_threadpool(find_model, context, caller, body.model)
    if model.task is None:
        raise InvalidRequestError(f"{body.model} is a base, which was tuned for no task; chat with it.", param="model")
    rows = body.input if isinstance(body.input, list) else [body.input]
    filter_prompt(context, json.dumps(rows, ensure_ascii=False))
    wanted = PredictRequest(f"pred-{request.state.request_id}", model.adapter, rows, body.max_tokens)
    found = await _while_heard(request, context.dispatcher.predict(model.base, wanted))
    context.measures.count_tokens("prompt", found.num_prompt_tokens)
    context.measures.count_tokens("generated", found.num_tokens)
    await run_in_threadpool(
        context.usage.record_request,
        tenant=caller.tenant,
        request=request.state.request_id,
        base=model.base.name,
        model=model.name,
        num_prompt_tokens=found.num_prompt_tokens,
        num_tokens=found.num_tokens,
    )
    refuse = context.content_filter.problem
    data = [
        {"object": "prediction", "index": at}
        | ({"finish_reason": "content_filter"} if refuse(json.dumps(row, ensure_ascii=False)) else row)
        for at, row in enumerate(found.rows)
    ]
    usage = {
        "prompt_tokens": found.num_prompt_tokens,
        "completion_tokens": found.num_tokens,
        "total_tokens": found.num_prompt_tokens + found.num_tokens,
    }
    return {"object": "list", "model": model.name, "data": data, "usage": usage}


async def _answer(request: Request, answer: Answering, stream: bool | None, wants_usage: bool) -> Response:
    if not stream:
        return JSONResponse(await _while_heard(request, answer.whole()))
    # The first event is awaited here, so that a request that cannot be answered gets its status, not a stream.
    events = answer.stream(wants_usage)
    first = await anext(events)
    if answer.problem is not None:
        raise answer.problem
    return StreamingResponse(
        _from(first, events), media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


async def _while_heard(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for work, and break it off where the caller goes away."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LISTEN_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise InvalidRequestError("The caller went away.", code="client_closed_request")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        with anyio.CancelScope(shield=True):
            await rest.aclose()  # type: ignore[attr-defined]
