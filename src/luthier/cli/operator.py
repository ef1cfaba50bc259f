"""Where the operator's verbs act: on the store of this machine, or over a server's admin API. Both speak its JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import typer

from luthier.cli.serve import open_context
from luthier.cli.where import server_of
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.client.api import Server
    from luthier.service.context import Context

ADMIN = "/luthier/admin"


class Operator(Protocol):
    """The verbs. Values are objects as the admin API answers them."""

    def create_tenant(self, name: str, weight: float, quotas: dict[str, int | None]) -> dict[str, Any]: ...

    def update_tenant(self, tenant: str, weight: float | None, quotas: dict[str, int | None]) -> dict[str, Any]: ...

    def tenants(self) -> list[dict[str, Any]]: ...

    def erase(self, tenant: str) -> None: ...

    def create_key(self, tenant: str, scopes: list[str], name: str, seconds: int | None) -> dict[str, Any]: ...

    def keys(self, tenant: str) -> list[dict[str, Any]]: ...

    def rotate(self, key: str, overlap_seconds: int) -> dict[str, Any]: ...

    def revoke(self, key: str) -> None: ...

    def usage(self, tenant: str | None, days: int) -> list[dict[str, Any]]: ...


def operator_of(context: typer.Context, data: str | None) -> Operator:
    """The server that --server names, else the store here.

    Raises:
        RecipeError: for a server together with --data.
    """
    server = server_of(context)
    if server is None:
        return Store(open_context(data, None))
    if data is not None:
        raise RecipeError("--server and --data name two places", "one of the two", "leave --data out")
    return Remote(server)


def refuse_server(context: typer.Context, verb: str) -> None:
    """For verbs that only the machine with the store can do.

    Raises:
        RecipeError: where --server is given.
    """
    if server_of(context) is not None:
        raise RecipeError(f"`luthier {verb}` copies files of the store itself", "the machine where the store is")


class Store:
    """The store of this machine."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def create_tenant(self, name: str, weight: float, quotas: dict[str, int | None]) -> dict[str, Any]:
        return _fields(self._context.tenants.create(name, weight, **quotas), "id", "name", "weight")

    def update_tenant(self, tenant: str, weight: float | None, quotas: dict[str, int | None]) -> dict[str, Any]:
        return _fields(self._context.tenants.update(tenant, weight, **quotas), "id", "name", "weight")

    def tenants(self) -> list[dict[str, Any]]:
        return [_fields(row, "id", "name", "weight") for row in self._context.tenants.all()]

    def erase(self, tenant: str) -> None:
        from luthier.registry.erasure import erase_tenant

        erase_tenant(self._context.database, self._context.blobs, tenant)

    def create_key(self, tenant: str, scopes: list[str], name: str, seconds: int | None) -> dict[str, Any]:
        row, text = self._context.tenants.create_key(tenant, scopes, name, seconds)
        return {"id": row.id, "key": text}

    def keys(self, tenant: str) -> list[dict[str, Any]]:
        names = ("id", "prefix", "scopes", "expires_at", "revoked_at", "name")
        return [_fields(row, *names) for row in self._context.tenants.keys(tenant)]

    def rotate(self, key: str, overlap_seconds: int) -> dict[str, Any]:
        row, text = self._context.tenants.rotate(key, overlap_seconds)
        return {"id": row.id, "key": text}

    def revoke(self, key: str) -> None:
        self._context.tenants.revoke(key)

    def usage(self, tenant: str | None, days: int) -> list[dict[str, Any]]:
        from luthier.store.database import now_seconds

        owner = None if tenant is None else self._context.tenants.get(tenant).id
        return self._context.usage.by_day(owner, now_seconds() // 86_400 - days + 1)


class Remote:
    """A server's admin API; its key needs the scope `admin`."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def create_tenant(self, name: str, weight: float, quotas: dict[str, int | None]) -> dict[str, Any]:
        return self._server.post(f"{ADMIN}/tenants", {"name": name, "weight": weight, **quotas})

    def update_tenant(self, tenant: str, weight: float | None, quotas: dict[str, int | None]) -> dict[str, Any]:
        body = quotas if weight is None else {"weight": weight, **quotas}
        return self._server.post(f"{ADMIN}/tenants/{_part(tenant)}", body)

    def tenants(self) -> list[dict[str, Any]]:
        return list(self._server.get(f"{ADMIN}/tenants")["data"])

    def erase(self, tenant: str) -> None:
        self._server.delete(f"{ADMIN}/tenants/{_part(tenant)}")

    def create_key(self, tenant: str, scopes: list[str], name: str, seconds: int | None) -> dict[str, Any]:
        body = {"scopes": scopes, "name": name, "expires_in_seconds": seconds}
        return self._server.post(f"{ADMIN}/tenants/{_part(tenant)}/keys", body)

    def keys(self, tenant: str) -> list[dict[str, Any]]:
        return list(self._server.get(f"{ADMIN}/tenants/{_part(tenant)}/keys")["data"])

    def rotate(self, key: str, overlap_seconds: int) -> dict[str, Any]:
        return self._server.post(f"{ADMIN}/keys/{_part(key)}/rotate", {"overlap_seconds": overlap_seconds})

    def revoke(self, key: str) -> None:
        self._server.delete(f"{ADMIN}/keys/{_part(key)}")

    def usage(self, tenant: str | None, days: int) -> list[dict[str, Any]]:
        rows = list(self._server.get(f"{ADMIN}/usage", days=days)["data"])
        if tenant is None:
            return rows
        owners = [row["id"] for row in self.tenants() if tenant in (row["id"], row["name"])]
        if not owners:
            raise RecipeError(f"the server has no tenant {tenant!r}", fix="`luthier --server URL tenants list`")
        return [row for row in rows if row["tenant"] in owners]


def _fields(row: object, *names: str) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def _part(name: str) -> str:
    return quote(name, safe="")
