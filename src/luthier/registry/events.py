"""A job's events, and the notices that go out when it ends. Rows are added and never changed."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.registry.seam import Level
from luthier.store.database import new_id, now_seconds
from luthier.store.tables import Delivery, Event, Job, Webhook

END_EVENTS = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")


def add_event(
    session: Session,
    job: str,
    key: str,
    message: str,
    *,
    level: Level = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
) -> bool:
    """Append an event; False, and nothing happens, where the job has one with this key."""
    if session.scalar(select(Event.seq).where(Event.job == job, Event.key == key)) is not None:
        return False
    session.add(
        Event(
            id=new_id("ftevent-"),
            job=job,
            key=key,
            created_at=now_seconds(),
            level=level,
            type=type,
            message=message,
            data=data or {},
        )
    )
    session.flush()
    return True


def announce_end(session: Session, job: Job) -> None:
    """Put the job's end into the mail of every webhook that wants to hear of it."""
    kind = f"fine_tuning.job.{job.status}"
    hooks = session.scalars(select(Webhook).where(Webhook.tenant == job.tenant)).all()
    for hook in hooks:
        if kind in hook.events:
            event = new_id("evt_")
            body = {
                "id": event,
                "object": "event",
                "type": kind,
                "created_at": now_seconds(),
                "data": {"id": job.id},
            }
            session.add(
                Delivery(
                    id=new_id("dlv_"),
                    webhook=hook.id,
                    event=event,
                    body=json.dumps(body, separators=(",", ":")),
                    num_attempts=0,
                    next_attempt_at=float(now_seconds()),
                )
            )
