"""Chat, plain completions, and what head models predict."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from luthier.registry.problems import InvalidRequestError
from luthier.service.auth import ContextDep, Inferrer
from luthier.service.bodies import ChatCreate, CompletionCreate, PredictCreate
from luthier.service.chat import Answering, chat_answer, completion_answer, find_model
from luthier.service.routes.common import ERRORS

router = APIRouter(responses=ERRORS, tags=["inference"])


@router.post("/chat/completions")
async def create_chat(body: ChatCreate, caller: Inferrer, context: ContextDep) -> Response:
    """Go on with a conversation."""
    return await _answer(await run_in_threadpool(chat_answer, context, caller, body), body.stream, body.wants_usage)


@router.post("/completions")
async def create_completion(body: CompletionCreate, caller: Inferrer, context: ContextDep) -> Response:
    """Go on with a text."""
    answer = await run_in_threadpool(completion_answer, context, caller, body)
    return await _answer(answer, body.stream, body.wants_usage)


@router.post("/luthier/predict")
async def create_prediction(
    body: PredictCreate, caller: Inferrer, context: ContextDep, request: Request
) -> dict[str, Any]:
    """Name the class of each text, or its labels where the model gives any number, with the probabilities of all."""
    model = await run_in_threadpool(find_model, context, caller, body.model)
    if model.task != "classification":
        raise InvalidRequestError(f"{body.model} has no head to predict with; chat with it.", param="model")
    texts = [body.input] if isinstance(body.input, str) else list(body.input)
    found = await context.dispatcher.predict(model.base, {"adapter": model.adapter, "texts": texts})
    num_tokens = int(found["num_tokens"])
    await run_in_threadpool(
        context.usage.record_request,
        tenant=caller.tenant,
        request=request.state.request_id,
        base=model.base.name,
        model=model.name,
        num_prompt_tokens=num_tokens,
        num_tokens=0,
    )
    data = [{"object": "prediction", "index": at, **row} for at, row in enumerate(found["predictions"])]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "model": model.name, "data": data, "usage": usage}


async def _answer(answer: Answering, stream: bool | None, wants_usage: bool) -> Response:
    if not stream:
        return JSONResponse(await answer.whole())
    # The first event is awaited here, so that a request that cannot be answered gets its status, not a stream.
    events = answer.stream(wants_usage)
    first = await anext(events)
    if answer.problem is not None:
        raise answer.problem
    return StreamingResponse(
        _from(first, events), media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()  # type: ignore[attr-defined]
