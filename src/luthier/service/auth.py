"""Who calls, and whether they may: a key in `Authorization: Bearer` or, as Azure sends it, in `api-key`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request

from luthier.registry.problems import InvalidKeyError, ScopeError
from luthier.registry.tenants import Caller
from luthier.service.context import Context


def context_of(request: Request) -> Context:
    """The process's context."""
    context: Context = request.app.state.context
    return context


def _caller(scope: str | None) -> Callable[[Request, Context], Caller]:
    def caller(request: Request, context: Annotated[Context, Depends(context_of)]) -> Caller:
        found = context.tenants.authenticate(_key(request))
        if scope is not None and scope not in found.scopes:
            raise ScopeError(f"This key lacks the scope {scope!r}.", code="missing_scope")
        request.state.tenant = found.tenant
        context.tenants.count_request(found.tenant)
        return found

    return caller


def _key(request: Request) -> str:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    if key := request.headers.get("api-key", ""):
        return key
    raise InvalidKeyError("You didn't provide an API key. Send it as `Authorization: Bearer KEY`.", code=None)


ContextDep = Annotated[Context, Depends(context_of)]
Anyone = Annotated[Caller, Depends(_caller(None))]
Tuner = Annotated[Caller, Depends(_caller("tune"))]
Inferrer = Annotated[Caller, Depends(_caller("infer"))]
Admin = Annotated[Caller, Depends(_caller("admin"))]
