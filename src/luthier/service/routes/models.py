"""Models: the bases, and the caller's tuned ones."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from luthier.registry.problems import ScopeError
from luthier.service.answers import base_object, model_object
from luthier.service.auth import Anyone, ContextDep, Tuner
from luthier.service.routes.common import ERRORS, V1, NamePath

router = APIRouter(prefix=V1, responses=ERRORS, tags=["models"])


@router.get("/models")
def list_models(caller: Anyone, context: ContextDep) -> dict[str, Any]:
    """Every model that the caller can name."""
    tuned = [model_object(model) for model in context.models.owned(caller.tenant)]
    return {"object": "list", "data": tuned + [base_object(base) for base in context.bases.all()]}


@router.get("/models/{model:path}")
def retrieve_model(model: NamePath, caller: Anyone, context: ContextDep) -> dict[str, Any]:
    """One model."""
    base = context.bases.find(model)
    return base_object(base) if base is not None else model_object(context.models.get(caller.tenant, model))


@router.delete("/models/{model:path}")
def delete_model(model: NamePath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Delete a tuned model. Refused while a job goes on from it."""
    if context.bases.find(model) is not None:
        raise ScopeError(f"{model} is a base that this service offers; only tuned models can be deleted.")
    context.models.delete(caller.tenant, model)
    return {"id": model, "object": "model", "deleted": True}
