"""Jobs as their owners see them: made, listed, paused, resumed, cancelled; with events, checkpoints and permissions.

    validating_files -> queued -> running -> succeeded | failed | cancelled
    validating_files, queued, running -> paused -> queued;  anything but an end -> cancelled

The status changes at once. A worker that holds the job reads it with its next verb, and saves and lets go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from luthier.registry.events import add_event, announce_end
from luthier.registry.files import Page
from luthier.registry.problems import InvalidRequestError, missing
from luthier.registry.tenants import LIVE_STATUSES, Caller
from luthier.registry.usage import job_costs
from luthier.store.database import Database, locking, new_id, now_seconds
from luthier.store.held_base import HeldBase
from luthier.store.tables import Checkpoint, Demand, Event, File, Job, Model, Permission, Tenant

END_STATUSES = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that holds and may be queued.

    Attributes:
        base: What a worker must hold to train it.
        model: What the caller named: the base, or a tuned model to go on from.
        spec: The JobSpec's values.
        hyperparameters: As resolved, under the OpenAI surface's names.
        training_file, validation_file: The files' records.
        hold_out: Share of the training rows to hold out where there is no validation file.
        parent: The tuned model to go on from, or None.
        start_from: Key prefix of the parent's files, where they are an adapter or layers to begin with.
        rows_checked: Whether all lines were looked at.
        estimate: What it is expected to take.
        labels: The caller's metadata.
    """

    base: HeldBase
    model: str
    spec: dict[str, Any]
    hyperparameters: dict[str, Any]
    training_file: File
    validation_file: File | None
    hold_out: float
    suffix: str | None
    seed: int
    labels: dict[str, str]
    parent: Model | None
    start_from: str | None
    rows_checked: bool
    estimate: dict[str, Any]


class Jobs:
    """The verbs on jobs. All are about one tenant's."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, caller: Caller, new: NewJob) -> Job:
        """Queue a job."""
        short = new_id("", 8)
        job_id = f"ftjob-{new_id('', 16)}{short}"
        row = Job(
            id=job_id,
            tenant=caller.tenant,
            status="queued" if new.rows_checked else "validating_files",
            held_base=new.base,
            model=new.model,
            tuned_model=f"ft:{new.base.name}:{caller.name}:{new.suffix or ''}:{short}",
            spec=new.spec,
            hyperparameters=new.hyperparameters,
            suffix=new.suffix,
            seed=new.seed,
            labels=dict(new.labels),
            training_file=new.training_file.id,
            validation_file=new.validation_file.id if new.validation_file else None,
            train_blob=new.training_file.blob,
            validation_blob=new.validation_file.blob if new.validation_file else None,
            hold_out=new.hold_out,
            start_from=new.start_from,
            parent=new.parent.id if new.parent else None,
            rows_checked=new.rows_checked,
            created_at=now_seconds(),
            estimate=new.estimate,
        )
        with self._database.writing() as session:
            files = [file.id for file in (new.training_file, new.validation_file) if file is not None]
            named = select(File.id).where(File.tenant == caller.tenant, File.id.in_(files)).order_by(File.seq)
            found = session.scalars(locking(named)).all()
            for file in files:
                if file not in found:
                    raise missing("File object", file, "training_file")
            session.add(row)
            session.flush()
            add_event(session, job_id, "created", f"Created fine-tuning job: {job_id}")
            add_event(session, job_id, "validating", f"Validating training file: {row.training_file}")
            if new.rows_checked:
                add_event(session, job_id, "queued", "Files validated, moving job to queued state")
            want_base(session, new.base, self._database.now(session))
        return row

    def get(self, tenant: str, job: str) -> Job:
        with self._database.reading() as session:
            return _job(session, tenant, job)

    def costs(self, jobs: Sequence[Job]) -> dict[str, float]:
        """What each has cost so far, by its id."""
        with self._database.reading() as session:
            return job_costs(session, [job.id for job in jobs])

    def page(
        self, tenant: str, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Page:
        """A page, newest first.

        Args:
            metadata: Only jobs with these pairs; None for all. An empty mapping means jobs without any.
        """
        with self._database.reading() as session:
            query = select(Job).where(Job.tenant == tenant)
            if after is not None:
                start = session.scalar(select(Job.seq).where(Job.tenant == tenant, Job.id == after))
                if start is None:
                    raise missing("fine-tuning job", after, "after")
                query = query.where(Job.seq < start)
            for key, value in (metadata or {}).items():
                query = query.where(Job.labels[key].as_string() == value)
            rows = list(session.scalars(query.order_by(Job.seq.desc()).limit(limit + 1)))
        if metadata == {}:
            rows = [row for row in rows if not row.labels]
        return Page(rows[:limit], len(rows) > limit)

    def cancel(self, tenant: str, job: str) -> Job:
        """End a job; what it trained so far is billed, and its checkpoints stay."""
        with self._database.writing() as session:
            row = _job(session, tenant, job, lock=True)
            if row.status in END_STATUSES:
                raise InvalidRequestError(
                    f"The job has {row.status} already and cannot be cancelled.", code="invalid_job_status"
                )
            row.status, row.finished_at = "cancelled", now_seconds()
            add_event(session, job, "cancelled", "The job has been cancelled")
            announce_end(session, row)
        return row

    def pause(self, tenant: str, job: str) -> Job:
        """Let a job rest at its next whole step, to go on from there."""
        with self._database.writing() as session:
            row = _job(session, tenant, job, lock=True)
            if row.status not in LIVE_STATUSES:
                raise InvalidRequestError(
                    f"Only a job that waits or runs can be paused; this one is {row.status}.", code="invalid_job_status"
                )
            row.status = "paused"
            add_event(session, job, f"paused:{new_id('', 8)}", "The job has been paused")
        return row

    def resume(self, tenant: str, job: str) -> Job:
        """Let a paused job go on."""
        with self._database.writing() as session:
            row = _job(session, tenant, job, lock=True)
            if row.status != "paused":
                raise InvalidRequestError(
                    f"Only a paused job can be resumed; this one is {row.status}.", code="invalid_job_status"
                )
            row.status = "queued" if row.rows_checked else "validating_files"
            add_event(session, job, f"resumed:{new_id('', 8)}", "The job has been resumed and waits in the queue")
            want_base(session, row.held_base, self._database.now(session))
        return row

    def events(self, tenant: str, job: str, after: str | None = None, limit: int = 20) -> Page:
        """A page of the job's events, newest first."""
        with self._database.reading() as session:
            _job(session, tenant, job)
            query = select(Event).where(Event.job == job)
            if after is not None:
                start = session.scalar(select(Event.seq).where(Event.job == job, Event.id == after))
                if start is None:
                    raise missing("event", after, "after")
                query = query.where(Event.seq < start)
            rows = list(session.scalars(query.order_by(Event.seq.desc()).limit(limit + 1)))
        return Page(rows[:limit], len(rows) > limit)

    def checkpoints(self, tenant: str, job: str, after: str | None = None, limit: int = 10) -> Page:
        """A page of the job's checkpoints that can be chatted with, newest first."""
        with self._database.reading() as session:
            _job(session, tenant, job)
            query = select(Checkpoint).where(Checkpoint.job == job, Checkpoint.blob.is_not(None))
            if after is not None:
                start = session.scalar(select(Checkpoint.seq).where(Checkpoint.job == job, Checkpoint.id == after))
                if start is None:
                    raise missing("checkpoint", after, "after")
                query = query.where(Checkpoint.seq < start)
            rows = list(session.scalars(query.order_by(Checkpoint.seq.desc()).limit(limit + 1)))
        return Page(rows[:limit], len(rows) > limit)

    def queue_length(self) -> dict[str, int]:
        """Jobs by status, of all tenants."""
        with self._database.reading() as session:
            return {s: int(n) for s, n in session.execute(select(Job.status, func.count()).group_by(Job.status))}

    # -- permissions on checkpoints

    def permit(self, tenant: str, model: str, projects: list[str]) -> list[Permission]:
        """Let other tenants (projects) use a checkpoint or model."""
        with self._database.writing() as session:
            _owned_model(session, tenant, model)
            # One at a time, so that none is given twice.
            session.scalars(locking(select(Tenant.seq).where(Tenant.id == tenant))).one()
            made = []
            for project in dict.fromkeys(projects):
                if session.scalar(select(Tenant.id).where(Tenant.id == project)) is None:
                    raise missing("project", project, "project_ids")
                row = session.scalar(select(Permission).where(Permission.model == model, Permission.project == project))
                if row is None:
                    row = Permission(
                        id=new_id("cp_"), tenant=tenant, model=model, project=project, created_at=now_seconds()
                    )
                    session.add(row)
                made.append(row)
        return made

    def permissions(
        self, tenant: str, model: str, project: str | None, after: str | None, limit: int, order: str
    ) -> Page:
        with self._database.reading() as session:
            _owned_model(session, tenant, model)
            query = select(Permission).where(Permission.model == model, Permission.tenant == tenant)
            if project is not None:
                query = query.where(Permission.project == project)
            newest_first = order != "ascending"
            if after is not None:
                start = session.scalar(select(Permission.seq).where(Permission.model == model, Permission.id == after))
                if start is None:
                    raise missing("permission", after, "after")
                query = query.where(Permission.seq < start if newest_first else Permission.seq > start)
            query = query.order_by(Permission.seq.desc() if newest_first else Permission.seq)
            rows = list(session.scalars(query.limit(limit + 1)))
        return Page(rows[:limit], len(rows) > limit)

    def forbid(self, tenant: str, model: str, permission: str) -> None:
        with self._database.writing() as session:
            _owned_model(session, tenant, model)
            row = session.scalar(select(Permission).where(Permission.model == model, Permission.id == permission))
            if row is None:
                raise missing("permission", permission, "permission_id")
            session.delete(row)


def want_base(session: Session, base: HeldBase, now: float) -> None:
    """Note that somebody waits for a worker that holds this."""
    key = {"base": base.name, "quantization": base.quantization, "weights": base.weights}
    # In one statement, for several may be the first to ask.
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(Demand).values(**key, wanted_at=now)
    session.execute(statement.on_conflict_do_update(index_elements=list(key), set_={"wanted_at": now}))


def _job(session: Session, tenant: str, job: str, lock: bool = False) -> Job:
    query = select(Job).where(Job.tenant == tenant, Job.id == job)
    row = session.scalar(locking(query) if lock else query)
    if row is None:
        raise missing("fine-tuning job", job, "fine_tuning_job_id")
    return row


def _owned_model(session: Session, tenant: str, model: str) -> None:
    checkpoint = select(Checkpoint.id).where(
        Checkpoint.tenant == tenant, Checkpoint.model == model, Checkpoint.blob.is_not(None)
    )
    tuned = select(Model.id).where(Model.tenant == tenant, Model.id == model)
    if session.scalar(checkpoint) is None and session.scalar(tuned) is None:
        raise missing("checkpoint", model, "fine_tuned_model_checkpoint")
