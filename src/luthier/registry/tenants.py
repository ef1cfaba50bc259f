"""Tenants, their keys, and what they may use.

A key is `sk-<key id>-<secret>`. The id finds the row; the whole key's SHA-256 is compared in constant time, against a
digest that nothing has where there is no row, so that a wrong id and a wrong secret take alike. The secret has 240
random bits, so a slow hash would add nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from luthier.registry.problems import InvalidKeyError, InvalidRequestError, QuotaError, missing
from luthier.store.database import Database, locking, new_id, now_seconds
from luthier.store.tables import Checkpoint, File, Job, Key, Model, RequestCount, Tenant, Upload, Usage

SCOPES = ("admin", "tune", "infer")
LIVE_STATUSES = ("validating_files", "queued", "running")
QUOTAS = ("max_storage_bytes", "max_running_jobs", "max_trained_tokens_per_day", "max_requests_per_minute")
_NO_DIGEST = "0" * 64
_KEY = re.compile(r"^sk-([A-Za-z0-9]{12})-[A-Za-z0-9_-]{40}$")
_NAME = re.compile(r"^[a-z0-9][a-z0-9-]{0,31}$")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        tenant, name: The tenant's id, and its name as in its models' names.
        key: The key's id.
        scopes: What the key may do.
    """

    tenant: str
    name: str
    key: str
    scopes: frozenset[str]


class Tenants:
    """The verbs on tenants and keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # -- tenants

    def create(self, name: str, weight: float = 1.0, **quotas: int | None) -> Tenant:
        """A new tenant.

        Raises:
            InvalidRequestError: for a name that is taken or has other characters than a-z, 0-9 and "-".
        """
        if not _NAME.match(name):
            raise InvalidRequestError(
                f"A tenant's name has 1 to 32 of a-z, 0-9 and '-', and begins with a letter or digit; found {name!r}.",
                param="name",
            )
        _check_numbers(weight, quotas)
        with self._database.writing() as session:
            if session.scalar(select(Tenant).where(Tenant.name == name)) is not None:
                raise InvalidRequestError(f"There is a tenant named {name!r} already.", param="name")
            values = {quota: quotas.get(quota) for quota in QUOTAS}
            tenant = Tenant(id=new_id("org-"), name=name, weight=weight, created_at=now_seconds(), **values)
            session.add(tenant)
        return tenant

    def all(self) -> list[Tenant]:
        with self._database.reading() as session:
            return list(session.scalars(select(Tenant).order_by(Tenant.seq)))

    def get(self, tenant: str) -> Tenant:
        """By id or name."""
        with self._database.reading() as session:
            return _tenant(session, tenant)

    def update(self, tenant: str, weight: float | None = None, **quotas: int | None) -> Tenant:
        """Change the weight and the given quotas; None takes a quota away."""
        _check_numbers(1.0 if weight is None else weight, quotas)
        with self._database.writing() as session:
            row = _tenant(session, tenant)
            if weight is not None:
                row.weight = weight
            for name, value in quotas.items():
                setattr(row, name, value)
        return row

    # -- keys

    def create_key(
        self, tenant: str, scopes: Iterable[str], name: str = "", expires_in_seconds: int | None = None
    ) -> tuple[Key, str]:
        """A new key; its text is in the second part, and nowhere else afterwards."""
        wanted = sorted(set(scopes))
        if not wanted or not set(wanted) <= set(SCOPES):
            raise InvalidRequestError(
                f"A key's scopes are some of {', '.join(SCOPES)}; found {wanted}.", param="scopes"
            )
        if expires_in_seconds is not None and expires_in_seconds < 1:
            raise InvalidRequestError("expires_in_seconds is 1 or more.", param="expires_in_seconds")
        with self._database.writing() as session:
            owner = _tenant(session, tenant)
            return _add_key(session, owner.id, wanted, name, expires_in_seconds)

    def keys(self, tenant: str) -> list[Key]:
        with self._database.reading() as session:
            owner = _tenant(session, tenant)
            return list(session.scalars(select(Key).where(Key.tenant == owner.id).order_by(Key.seq)))

    def revoke(self, key: str, tenant: str | None = None) -> Key:
        """End a key at once."""
        with self._database.writing() as session:
            row = _key(session, key, tenant)
            row.revoked_at = row.revoked_at or now_seconds()
        return row

    def rotate(self, key: str, overlap_seconds: int = 0, tenant: str | None = None) -> tuple[Key, str]:
        """A new key with the same scopes, given as long as the old one was; that ends after `overlap_seconds`."""
        with self._database.writing() as session:
            old = _key(session, key, tenant)
            if not _is_live(old):
                raise InvalidRequestError(f"The key {key} has ended already; create a new one.", param="key")
            life = None if old.expires_at is None else old.expires_at - old.created_at
            end = now_seconds() + overlap_seconds
            old.expires_at = end if old.expires_at is None else min(end, old.expires_at)
            if overlap_seconds <= 0:
                old.revoked_at = now_seconds()
            return _add_key(session, old.tenant, old.scopes, old.name, life)

    def authenticate(self, text: str) -> Caller:
        """Who a key belongs to.

        Raises:
            InvalidKeyError: for a key that does not exist, has expired or was revoked. The answer is the same for all.
        """
        found = _KEY.match(text)
        with self._database.reading() as session:
            row = session.scalar(select(Key).where(Key.id == f"key_{found[1]}")) if found else None
            is_right = hmac.compare_digest(_digest(text), row.digest if row is not None else _NO_DIGEST)
            if row is None or not is_right or not _is_live(row):
                raise InvalidKeyError("Incorrect API key provided.", code="invalid_api_key")
            tenant = session.scalars(select(Tenant).where(Tenant.id == row.tenant)).one()
            return Caller(tenant.id, tenant.name, row.id, frozenset(row.scopes))

    # -- limits

    def count_request(self, tenant: str) -> None:
        """Count a request against the tenant's quota of this minute.

        Raises:
            QuotaError: when it is used up.
        """
        now = now_seconds()
        minute = now // 60
        with self._database.reading() as session:
            quota = session.scalars(select(Tenant.max_requests_per_minute).where(Tenant.id == tenant)).one()
        if quota is None:
            return
        with self._database.writing() as session:
            session.scalars(locking(select(Tenant.seq).where(Tenant.id == tenant))).one()
            row = session.get(RequestCount, (tenant, minute))
            if row is None:
                session.execute(delete(RequestCount).where(RequestCount.tenant == tenant))
                session.add(RequestCount(tenant=tenant, minute=minute, num_requests=1))
                num_requests = 1
            else:
                row.num_requests = num_requests = row.num_requests + 1
        if num_requests > quota:
            raise QuotaError(
                f"Rate limit reached: {quota} requests a minute. Try again in {60 - now % 60} s.",
                code="rate_limit_exceeded",
                retry_after_seconds=60 - now % 60,
            )


def check_storage(session: Session, tenant: str, more_bytes: int) -> None:
    """Whether the tenant may store more.

    Raises:
        QuotaError: when not.
    """
    quota = session.scalars(select(Tenant.max_storage_bytes).where(Tenant.id == tenant)).one()
    if quota is None:
        return
    used = storage_bytes(session, tenant)
    if used + more_bytes > quota:
        raise QuotaError(
            f"The storage quota of {quota:,} bytes would be passed: {used:,} are used and {more_bytes:,} more are "
            "needed. Delete files that are not needed any more.",
            code="storage_quota_exceeded",
        )


def storage_bytes(session: Session, tenant: str) -> int:
    """Bytes of the tenant's files, announced uploads, models and checkpoints."""
    parts = (
        select(func.sum(File.num_bytes)).where(File.tenant == tenant),
        select(func.sum(Upload.num_bytes)).where(Upload.tenant == tenant, Upload.status == "pending"),
        select(func.sum(Model.num_bytes)).where(Model.tenant == tenant),
        select(func.sum(Checkpoint.num_bytes)).where(Checkpoint.tenant == tenant, Checkpoint.blob.is_not(None)),
    )
    return sum(int(session.scalar(part) or 0) for part in parts)


def num_running(session: Session, tenant: str) -> int:
    """Jobs of the tenant that a worker holds, from its claim on: between claim and first step it prepares the data."""
    held = select(func.count()).where(Job.tenant == tenant, Job.status.in_(LIVE_STATUSES), Job.holder.is_not(None))
    return int(session.scalar(held) or 0)


def trained_tokens_today(session: Session, tenant: str) -> int:
    """Tokens trained since midnight UTC."""
    today = now_seconds() // 86_400
    trained = select(func.sum(Usage.num_tokens)).where(
        Usage.tenant == tenant, Usage.day == today, Usage.kind == "trained"
    )
    return int(session.scalar(trained) or 0)


def _tenant(session: Session, name: str) -> Tenant:
    row = session.scalar(select(Tenant).where((Tenant.id == name) | (Tenant.name == name)))
    if row is None:
        raise missing("tenant", name, "tenant")
    return row


def _key(session: Session, key: str, tenant: str | None) -> Key:
    query = select(Key).where(Key.id == key)
    row = session.scalar(query if tenant is None else query.where(Key.tenant == tenant))
    if row is None:
        raise missing("key", key, "key")
    return row


def _add_key(
    session: Session, tenant: str, scopes: Iterable[str], name: str, expires_in_seconds: int | None
) -> tuple[Key, str]:
    name_part = new_id("", 12)
    text = f"sk-{name_part}-{secrets.token_urlsafe(30)}"
    now = now_seconds()
    row = Key(
        id=f"key_{name_part}",
        tenant=tenant,
        name=name[:64],
        prefix=text[:8] + "...",
        digest=_digest(text),
        scopes=list(scopes),
        created_at=now,
        expires_at=None if expires_in_seconds is None else now + expires_in_seconds,
    )
    session.add(row)
    return row, text


def _is_live(key: Key) -> bool:
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now_seconds())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _check_numbers(weight: float, quotas: dict[str, int | None]) -> None:
    if not 0 < weight < 1e6:
        raise InvalidRequestError(f"A weight is a positive number; found {weight}.", param="weight")
    for name, value in quotas.items():
        if name not in QUOTAS:
            raise InvalidRequestError(f"{name} is no quota; known: {', '.join(QUOTAS)}.", param=name)
        if value is not None and value < 0:
            raise InvalidRequestError(f"{name} is 0 or more, or null for no limit; found {value}.", param=name)
