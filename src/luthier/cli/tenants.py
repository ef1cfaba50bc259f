"""`luthier tenants`, `keys` and `usage`, of a server or the store here; `backup` and `restore`, of the store here."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.console import print_json
from luthier.cli.operator import operator_of, refuse_server
from luthier.cli.serve import Data, open_context
from luthier.errors import RecipeError

tenants_app = typer.Typer(
    help="Tenants of a server (--server URL), or of the service on this machine.", no_args_is_help=True
)
keys_app = typer.Typer(
    help="API keys of a server (--server URL), or of the service on this machine.", no_args_is_help=True
)
Quota = Annotated[int | None, typer.Option(help="A limit; leave out for none.")]


@tenants_app.command("create")
def create_tenant(
    context: typer.Context,
    name: str,
    weight: Annotated[float, typer.Option(help="Share of the workers against the others'.")] = 1.0,
    storage_bytes: Quota = None,
    running_jobs: Quota = None,
    trained_tokens_per_day: Quota = None,
    requests_per_minute: Quota = None,
    data: Data = None,
) -> None:
    """A new tenant."""
    quotas = _quotas(storage_bytes, running_jobs, trained_tokens_per_day, requests_per_minute)
    print(operator_of(context, data).create_tenant(name, weight, quotas)["id"])


@tenants_app.command("update")
def update_tenant(
    context: typer.Context,
    tenant: str,
    weight: Annotated[float | None, typer.Option(help="Share of the workers against the others'.")] = None,
    storage_bytes: Quota = None,
    running_jobs: Quota = None,
    trained_tokens_per_day: Quota = None,
    requests_per_minute: Quota = None,
    unlimited: Annotated[
        list[str] | None, typer.Option("--unlimited", metavar="QUOTA", help="Take this quota away; may be repeated.")
    ] = None,
    data: Data = None,
) -> None:
    """Change a tenant's weight and quotas; what is not named stays."""
    given = _quotas(storage_bytes, running_jobs, trained_tokens_per_day, requests_per_minute)
    changes: dict[str, int | None] = {name: value for name, value in given.items() if value is not None}
    for name in unlimited or []:
        quota = f"max_{name.replace('-', '_')}"
        if quota not in given:
            known = ", ".join(known.removeprefix("max_").replace("_", "-") for known in given)
            raise RecipeError(f"--unlimited {name} is no quota", f"one of {known}")
        changes[quota] = None
    print(operator_of(context, data).update_tenant(tenant, weight, changes)["id"])


@tenants_app.command("list")
def list_tenants(context: typer.Context, data: Data = None) -> None:
    """All tenants."""
    for row in operator_of(context, data).tenants():
        print(f"{row['id']}  {row['name']}  weight {row['weight']:g}")


@tenants_app.command("erase")
def erase(
    context: typer.Context,
    tenant: str,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data: Data = None,
) -> None:
    """Erase a tenant with all of its files, jobs, models and usage, for good."""
    operator = operator_of(context, data)
    if not yes:
        typer.confirm(f"Erase {tenant} and all of its data for good?", abort=True)
    operator.erase(tenant)
    print(f"{tenant} is erased.")


@keys_app.command("create")
def create_key(
    context: typer.Context,
    tenant: str,
    scope: Annotated[list[str] | None, typer.Option(help="admin, tune or infer; default: tune and infer.")] = None,
    name: Annotated[str, typer.Option(help="What lists show.")] = "",
    days: Annotated[int | None, typer.Option(help="Ends after so many days.")] = None,
    data: Data = None,
) -> None:
    """A new key, printed once."""
    seconds = None if days is None else days * 86_400
    made = operator_of(context, data).create_key(tenant, scope or ["tune", "infer"], name, seconds)
    print(f"{made['id']}  {made['key']}")


@keys_app.command("list")
def list_keys(context: typer.Context, tenant: str, data: Data = None) -> None:
    """A tenant's keys, without the keys themselves."""
    for row in operator_of(context, data).keys(tenant):
        until = row["expires_at"]
        state = "revoked" if row["revoked_at"] else f"until {_day(until)}" if until else "live"
        print(f"{row['id']}  {row['prefix']}  {','.join(row['scopes'])}  {state}  {row['name']}")


@keys_app.command("rotate")
def rotate_key(
    context: typer.Context,
    key: str,
    overlap_seconds: Annotated[int, typer.Option(help="How long the old key goes on.")] = 0,
    data: Data = None,
) -> None:
    """A new key in place of an old one."""
    made = operator_of(context, data).rotate(key, overlap_seconds)
    print(f"{made['id']}  {made['key']}")


@keys_app.command("revoke")
def revoke_key(context: typer.Context, key: str, data: Data = None) -> None:
    """End a key at once."""
    operator_of(context, data).revoke(key)
    print(f"{key} is revoked.")


def usage_command(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Argument(help="A tenant's name or id; default: all.")] = None,
    days: Annotated[int, typer.Option(help="How far back.")] = 31,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data: Data = None,
) -> None:
    """Trained and generated tokens and their cost, by day and model."""
    rows = operator_of(context, data).usage(tenant, days)
    if json:
        print_json(rows)
        return
    for row in rows:
        counts = "  ".join(f"{kind} {row[f'{kind}_tokens']:,}" for kind in ("trained", "prompt", "generated"))
        print(f"{_day(row['day'])}  {row['tenant']}  {row['model']}  {counts}  cost {row['cost']:g}")


BlobsOnly = Annotated[
    bool, typer.Option("--blobs-only", help="Leave the database to its own tools, as with PostgreSQL; blobs alone.")
]


def backup_command(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    data: Data = None,
    blobs_only: BlobsOnly = False,
) -> None:
    """Copy database and blobs into a new folder, while the service runs. PostgreSQL: pg_dump, then --blobs-only."""
    from luthier.registry.backup import back_up, back_up_blobs

    refuse_server(context, "backup")
    store = open_context(data, None)
    if blobs_only:
        print(f"{target} holds {back_up_blobs(store.blobs, target)} blobs.")
        return
    num_files = back_up(store.database, store.blobs, target)
    print(f"{target} holds the database and {num_files} blobs.")


def restore_command(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="What `luthier backup` wrote.")],
    data: Data = None,
    blobs_only: BlobsOnly = False,
) -> None:
    """Put a backup where no service has been yet."""
    from luthier.registry.backup import restore, restore_blobs
    from luthier.service.settings import read_service_settings
    from luthier.store.blobs import Blobs

    refuse_server(context, "restore")
    if blobs_only:
        store = open_context(data, None)
        num_files = restore_blobs(source, store.database, store.blobs)
        print(f"{num_files} blobs are back, and the database names no other.")
        return
    settings = read_service_settings(data)
    restore(source, settings.database_url, Blobs(settings.storage, dict(settings.storage_options)))
    print(f"{settings.data_folder} holds what {source} held.")


def _quotas(
    storage_bytes: int | None,
    running_jobs: int | None,
    trained_tokens_per_day: int | None,
    requests_per_minute: int | None,
) -> dict[str, int | None]:
    """By the names of the store."""
    return {
        "max_storage_bytes": storage_bytes,
        "max_running_jobs": running_jobs,
        "max_trained_tokens_per_day": trained_tokens_per_day,
        "max_requests_per_minute": requests_per_minute,
    }


def _day(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
