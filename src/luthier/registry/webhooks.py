"""Webhooks: where tenants want to hear of their jobs' ends, and the deliveries that wait.

Signed as the `openai` client verifies it (Standard Webhooks): HMAC-SHA256 over "{id}.{timestamp}.{body}" with the
secret's bytes, in `webhook-signature: v1,...`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import secrets
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from sqlalchemy import delete, select

from luthier.registry.events import END_EVENTS
from luthier.registry.problems import InvalidRequestError, missing
from luthier.store.database import Database, new_id, now_seconds
from luthier.store.tables import Delivery, Webhook

RETRY_SECONDS = (5, 30, 120, 600, 3_600, 14_400)
"""Waits between attempts; after the last a delivery is given up."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A delivery that is due."""

    id: str
    event: str
    url: str
    secret: str
    body: str


class Webhooks:
    """The verbs on webhooks: a tenant's, and those of whoever delivers.

    Args:
        may_be_private: Whether addresses inside the operator's own network are allowed.
    """

    def __init__(self, database: Database, may_be_private: bool = False) -> None:
        self._database = database
        self.may_be_private = may_be_private

    def create(self, tenant: str, url: str, events: list[str] | None) -> Webhook:
        """A new webhook; its secret is shown once.

        Raises:
            InvalidRequestError: for what is no http(s) URL, or leads to a private address.
        """
        try:
            permitted_address(url, self.may_be_private)
        except AddressError as problem:
            raise InvalidRequestError(f"The webhook's url {problem}.", param="url") from None
        row = Webhook(
            id=new_id("whk_"),
            tenant=tenant,
            url=url,
            secret="whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
            events=list(events or END_EVENTS),
            created_at=now_seconds(),
        )
        with self._database.writing() as session:
            session.add(row)
        return row

    def all(self, tenant: str) -> list[Webhook]:
        with self._database.reading() as session:
            return list(session.scalars(select(Webhook).where(Webhook.tenant == tenant).order_by(Webhook.seq)))

    def delete(self, tenant: str, webhook: str) -> None:
        with self._database.writing() as session:
            # Locked, so that no job's end adds a delivery between the two deletions.
            query = select(Webhook).where(Webhook.tenant == tenant, Webhook.id == webhook)
            row = session.scalar(query.with_for_update())
            if row is None:
                raise missing("webhook", webhook, "webhook")
            session.execute(delete(Delivery).where(Delivery.webhook == webhook))
            session.delete(row)

    def take_due(self, limit: int = 20) -> list[Waiting]:
        """Deliveries whose time has come. Each is put off first, so that two processes do not send it at once."""
        with self._database.writing() as session:
            now = self._database.now(session)
            due = select(Delivery, Webhook).join(Webhook, Webhook.id == Delivery.webhook)
            due = due.where(Delivery.delivered_at.is_(None), Delivery.next_attempt_at <= now).limit(limit)
            found = session.execute(due.with_for_update(key_share=True, skip_locked=True, of=Delivery)).all()
            for delivery, _ in found:
                wait = RETRY_SECONDS[delivery.num_attempts] if delivery.num_attempts < len(RETRY_SECONDS) else None
                delivery.num_attempts += 1
                delivery.next_attempt_at = None if wait is None else now + wait
            return [Waiting(d.id, d.event, hook.url, hook.secret, d.body) for d, hook in found]

    def settle(self, delivery: str, problem: str | None) -> None:
        """Note how an attempt went."""
        with self._database.writing() as session:
            row = session.scalar(select(Delivery).where(Delivery.id == delivery))
            if row is not None:
                row.problem = problem
                if problem is None:
                    row.delivered_at, row.next_attempt_at = now_seconds(), None


def sign(secret: str, event: str, timestamp: int, body: str) -> str:
    """The value of `webhook-signature`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{event}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


class AddressError(ValueError):
    """A URL that is not called. The text goes on after "the webhook's url "."""


def permitted_address(url: str, may_be_private: bool) -> str | None:
    """The address to connect to for a URL, so that its name cannot come to mean another between this look and the call.

    Returns:
        None where any address may be called.

    Raises:
        AddressError: for what is no http(s) URL, or leads to an address that is not public.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise AddressError("is no URL") from None
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
        raise AddressError("is not http(s)://host/...")
    if may_be_private:
        return None
    if parts.scheme != "https":
        raise AddressError("is not https")
    try:
        found = socket.getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise AddressError("names a host that is not known") from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses or not all(address.is_global and not address.is_multicast for address in addresses):
        raise AddressError("leads to a private address")
    return str(addresses[0])
