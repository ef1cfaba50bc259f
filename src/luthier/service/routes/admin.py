"""The operator's routes: tenants, keys, prices, usage, erasure. They need a key with the scope `admin`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from luthier.registry.erasure import erase_tenant
from luthier.registry.tenants import QUOTAS
from luthier.service.auth import Admin, Anyone, ContextDep, Tuner
from luthier.service.bodies import KeyCreate, KeyRotate, PriceSet, TenantCreate, TenantUpdate, WebhookCreate
from luthier.service.routes.common import ERRORS, V1, IdPath
from luthier.store.database import now_seconds
from luthier.store.tables import Key, Price, Tenant, Webhook

router = APIRouter(prefix=f"{V1}/luthier", responses=ERRORS, tags=["luthier"])
SinceDays = Annotated[int, Query(ge=1, le=3_660)]


@router.get("/usage")
def own_usage(caller: Anyone, context: ContextDep, days: SinceDays = 31) -> dict[str, Any]:
    """The caller's tokens and costs by day and model."""
    since = now_seconds() // 86_400 - days + 1
    return {"object": "list", "data": context.usage.by_day(caller.tenant, since)}


@router.post("/webhooks")
def create_webhook(body: WebhookCreate, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Hear of jobs' ends. The secret in the answer signs the calls, and is not shown again."""
    row = context.webhooks.create(caller.tenant, body.url, list(body.events) if body.events else None)
    return {**_webhook(row), "secret": row.secret}


@router.get("/webhooks")
def list_webhooks(caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """The caller's webhooks."""
    return {"object": "list", "data": [_webhook(row) for row in context.webhooks.all(caller.tenant)]}


@router.delete("/webhooks/{webhook}")
def delete_webhook(webhook: IdPath, caller: Tuner, context: ContextDep) -> dict[str, Any]:
    """Hear no more."""
    context.webhooks.delete(caller.tenant, webhook)
    return {"id": webhook, "object": "webhook", "deleted": True}


@router.post("/admin/tenants")
def create_tenant(body: TenantCreate, caller: Admin, context: ContextDep) -> dict[str, Any]:
    """A new tenant."""
    values = body.model_dump()
    return _tenant(context.tenants.create(values.pop("name"), values.pop("weight"), **values))


@router.get("/admin/tenants")
def list_tenants(caller: Admin, context: ContextDep) -> dict[str, Any]:
    """All tenants."""
    return {"object": "list", "data": [_tenant(row) for row in context.tenants.all()]}


@router.post("/admin/tenants/{tenant}")
def update_tenant(tenant: IdPath, body: TenantUpdate, caller: Admin, context: ContextDep) -> dict[str, Any]:
    """Change a tenant's weight and quotas."""
    values = body.model_dump(exclude_unset=True)
    return _tenant(context.tenants.update(tenant, values.pop("weight", None), **values))


@router.delete("/admin/tenants/{tenant}")
def delete_tenant(tenant: IdPath, caller: Admin, context: ContextDep) -> dict[str, Any]:
    """Erase a tenant and all of its data, for good."""
    erase_tenant(context.database, context.blobs, tenant)
    return {"id": tenant, "object": "tenant", "deleted": True}


@router.post("/admin/tenants/{tenant}/keys")
def create_key(tenant: IdPath, body: KeyCreate, caller: Admin, context: ContextDep) -> dict[str, Any]:
    """A new key. It is in the answer, and nowhere else."""
    row, text = context.tenants.create_key(tenant, body.scopes, body.name, body.expires_in_seconds)
    return {**_key(row), "key": text}


@router.get("/admin/tenants/{tenant}/keys")
def list_keys(tenant: IdPath, caller: Admin, context: ContextDep) -> dict[str, Any]:
    """A tenant's keys, without the keys themselves."""
    return {"object": "list", "data": [_key(row) for row in context.tenants.keys(tenant)]}


@router.post("/admin/keys/{key}/rotate")
def rotate_key(key: IdPath, body: KeyRotate, caller: Admin, context: ContextDep) -> dict[str, Any]:
    """A new key in place of an old one."""
    row, text = context.tenants.rotate(key, body.overlap_seconds)
    return {**_key(row), "key": text}


@router.delete("/admin/keys/{key}")
def revoke_key(key: IdPath, caller: Admin, context: ContextDep) -> dict[str, Any]:
    """End a key at once."""
    context.tenants.revoke(key)
    return {"id": key, "object": "key", "deleted": True}


@router.get("/admin/usage")
def usage(caller: Admin, context: ContextDep, days: SinceDays = 31) -> dict[str, Any]:
    """All tenants' tokens and costs."""
    return {"object": "list", "data": context.usage.by_day(None, now_seconds() // 86_400 - days + 1)}


@router.get("/admin/prices")
def prices(caller: Admin, context: ContextDep) -> dict[str, Any]:
    """Prices a million tokens."""
    return {"object": "list", "data": [_price(row) for row in context.usage.prices()]}


@router.post("/admin/prices/{base}")
def set_price(base: IdPath, body: PriceSet, caller: Admin, context: ContextDep) -> dict[str, Any]:
    """Set a base's prices; "*" is for all others."""
    return _price(context.usage.set_price(base, body.trained, body.prompt, body.generated))


def _tenant(row: Tenant) -> dict[str, Any]:
    quotas = {name: getattr(row, name) for name in QUOTAS}
    return {
        "id": row.id,
        "object": "tenant",
        "name": row.name,
        "weight": row.weight,
        "created_at": row.created_at,
    } | quotas


def _key(row: Key) -> dict[str, Any]:
    names = ("id", "tenant", "name", "prefix", "scopes", "created_at", "expires_at", "revoked_at")
    return {"object": "key", **{name: getattr(row, name) for name in names}}


def _webhook(row: Webhook) -> dict[str, Any]:
    return {"id": row.id, "object": "webhook", "url": row.url, "events": row.events, "created_at": row.created_at}


def _price(row: Price) -> dict[str, Any]:
    return {"base": row.base, "trained": row.trained, "prompt": row.prompt, "generated": row.generated}
