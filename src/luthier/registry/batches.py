"""Batches: many requests in a file. Answers are kept line by line, so that a batch goes on where its runner stopped."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from luthier.registry.files import OPEN_BATCHES, Page
from luthier.registry.problems import InvalidRequestError, missing
from luthier.store.database import Database, locking, new_id, now_seconds
from luthier.store.tables import Batch, BatchLine

LIFE_SECONDS = 86_400


class Batches:
    """The verbs on batches: a tenant's, and those of whoever runs them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant: str, input_file: str, endpoint: str, window: str, labels: dict[str, str]) -> Batch:
        now = now_seconds()
        row = Batch(
            id=new_id("batch_"),
            tenant=tenant,
            status="validating",
            endpoint=endpoint,
            window=window,
            input_file=input_file,
            labels=dict(labels),
            counts={"total": 0, "completed": 0, "failed": 0},
            problems=[],
            times={"expires_at": now + LIFE_SECONDS},
            created_at=now,
        )
        with self._database.writing() as session:
            session.add(row)
        return row

    def get(self, tenant: str, batch: str) -> Batch:
        with self._database.reading() as session:
            return _batch(session, tenant, batch)

    def page(self, tenant: str, after: str | None, limit: int) -> Page:
        with self._database.reading() as session:
            query = select(Batch).where(Batch.tenant == tenant)
            if after is not None:
                start = session.scalar(select(Batch.seq).where(Batch.tenant == tenant, Batch.id == after))
                if start is None:
                    raise missing("batch", after, "after")
                query = query.where(Batch.seq < start)
            rows = list(session.scalars(query.order_by(Batch.seq.desc()).limit(limit + 1)))
        return Page(rows[:limit], len(rows) > limit)

    def cancel(self, tenant: str, batch: str) -> Batch:
        with self._database.writing() as session:
            row = _batch(session, tenant, batch, lock=True)
            if row.status not in ("validating", "in_progress"):
                raise InvalidRequestError(f"The batch is {row.status} and cannot be cancelled.", param="batch_id")
            row.status = "cancelling"
            row.times = {**row.times, "cancelling_at": now_seconds()}
        return row

    # -- for the runner

    def claim(self, holder: str, lease_seconds: float) -> Batch | None:
        """Take the oldest open batch that nobody runs."""
        with self._database.writing() as session:
            now = self._database.now(session)
            is_free = or_(Batch.holder.is_(None), Batch.lease_until < now)
            query = select(Batch).where(Batch.status.in_(OPEN_BATCHES), is_free).order_by(Batch.seq).limit(1)
            row = session.scalar(locking(query, skip_locked=True))
            if row is not None:
                row.holder, row.lease_until = holder, now + lease_seconds
        return row

    def keep(self, batch: str, holder: str, lease_seconds: float) -> str | None:
        """Renew the lease; the batch's status, or None where another runs it now."""
        with self._database.writing() as session:
            row = session.scalar(locking(select(Batch).where(Batch.id == batch)))
            if row is None or row.holder != holder:
                return None
            row.lease_until = self._database.now(session) + lease_seconds
            return row.status

    def done_lines(self, batch: str) -> set[int]:
        with self._database.reading() as session:
            return set(session.scalars(select(BatchLine.line).where(BatchLine.batch == batch)))

    def answers(self, batch: str, is_error: bool) -> list[dict[str, Any]]:
        with self._database.reading() as session:
            query = select(BatchLine).where(BatchLine.batch == batch, BatchLine.is_error == is_error)
            return [row.answer for row in session.scalars(query.order_by(BatchLine.line))]

    def add_answer(self, batch: str, line: int, answer: dict[str, Any], is_error: bool) -> None:
        """Keep one line's answer, once."""
        with self._database.writing() as session:
            # The batch is locked before its line is looked for, so that two writers do not both add it.
            row = session.scalars(locking(select(Batch).where(Batch.id == batch))).one()
            if session.get(BatchLine, (batch, line)) is not None:
                return
            session.add(BatchLine(batch=batch, line=line, answer=answer, is_error=is_error))
            session.flush()
            errors = session.scalar(select(func.count()).where(BatchLine.batch == batch, BatchLine.is_error.is_(True)))
            total = session.scalar(select(func.count()).where(BatchLine.batch == batch))
            row.counts = {**row.counts, "completed": int(total or 0) - int(errors or 0), "failed": int(errors or 0)}

    def set_status(self, batch: str, status: str, **values: Any) -> None:
        """Move on, and note when; an end lets the batch go."""
        with self._database.writing() as session:
            row = session.scalars(locking(select(Batch).where(Batch.id == batch))).one()
            if row.status == "cancelling" and status == "in_progress":
                return
            row.status = status
            row.times = {**row.times, f"{status}_at": now_seconds()}
            for name, value in values.items():
                setattr(row, name, value)
            if status not in OPEN_BATCHES:
                row.holder = row.lease_until = None


def _batch(session: Session, tenant: str, batch: str, lock: bool = False) -> Batch:
    query = select(Batch).where(Batch.tenant == tenant, Batch.id == batch)
    row = session.scalar(locking(query) if lock else query)
    if row is None:
        raise missing("batch", batch, "batch_id")
    return row
