"""Batches."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from luthier.registry.problems import InvalidRequestError
from luthier.service.answers import batch_object, page_object
from luthier.service.auth import ContextDep, Inferrer
from luthier.service.batch_runner import ENDPOINTS
from luthier.service.bodies import BatchCreate
from luthier.service.routes.common import ERRORS, V1, After, IdPath, Limit

router = APIRouter(prefix=f"{V1}/batches", responses=ERRORS, tags=["batches"])


@router.post("")
def create_batch(body: BatchCreate, caller: Inferrer, context: ContextDep) -> dict[str, Any]:
    """Answer many requests from a file."""
    if body.endpoint not in ENDPOINTS:
        raise InvalidRequestError(f"endpoint is one of {', '.join(ENDPOINTS)}.", param="endpoint")
    if body.output_expires_after is not None:
        raise InvalidRequestError("output_expires_after is not served; delete the file.", param="output_expires_after")
    file = context.files.get(caller.tenant, body.input_file_id)
    if file.purpose != "batch":
        raise InvalidRequestError(
            f"{file.id} has the purpose {file.purpose!r}; it must be 'batch'.", param="input_file_id"
        )
    return batch_object(
        context.batches.create(caller.tenant, file.id, body.endpoint, body.completion_window, body.metadata or {})
    )


@router.get("")
def list_batches(caller: Inferrer, context: ContextDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Batches, newest first."""
    return page_object(context.batches.page(caller.tenant, after, limit), batch_object)


@router.get("/{batch_id}")
def retrieve_batch(batch_id: IdPath, caller: Inferrer, context: ContextDep) -> dict[str, Any]:
    """One batch."""
    return batch_object(context.batches.get(caller.tenant, batch_id))


@router.post("/{batch_id}/cancel")
def cancel_batch(batch_id: IdPath, caller: Inferrer, context: ContextDep) -> dict[str, Any]:
    """Stop a batch; what it answered so far is kept."""
    return batch_object(context.batches.cancel(caller.tenant, batch_id))
