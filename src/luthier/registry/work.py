"""What the store offers workers: `luthier.registry.seam.WorkRecord` over the database."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.orm import Session

from luthier.registry.events import add_event, announce_end
from luthier.registry.placement import (
    CLAIMABLE,
    ROOM_SECONDS,
    choose_jobs,
    has_memory,
    is_free,
    may_fit,
    nowhere,
    say_base_waits,
    say_job_waits,
    wanted_bases,
)
from luthier.registry.problems import LeaseLostError
from luthier.registry.seam import (
    CheckpointRecord,
    Claim,
    ClaimedJob,
    JobResult,
    Level,
    Room,
    StepRecord,
    WantedBase,
    Wish,
    WorkerCard,
)
from luthier.registry.tenants import trained_tokens_today
from luthier.registry.usage import add_usage, job_cost
from luthier.store.blobs import Blobs
from luthier.store.database import Database, locking, new_id, now_seconds
from luthier.store.held_base import HeldBase
from luthier.store.tables import Checkpoint, Event, File, Job, Model, Place, RoomThere, Tenant, Worker

MAX_LOSSES = 10
"""A job whose holders die this often without a checkpoint in between is taken to be what kills them."""


class StoredWork:
    """The verbs of `WorkRecord`."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    # -- presence

    def register(self, card: WorkerCard, lease_seconds: float) -> None:
        with self._database.writing() as session:
            now = self._database.now(session)
            session.merge(
                Worker(
                    id=card.id,
                    held_base=card.base,
                    address=card.address,
                    secret=card.secret,
                    started_at=int(now),
                    lease_until=now + lease_seconds,
                    place=card.place,
                    free_bytes=card.free_bytes,
                    total_bytes=card.total_bytes,
                )
            )

    def attend(self, place: str, bases: Collection[str], lease_seconds: float) -> None:
        with self._database.writing() as session:
            now = self._database.now(session)
            session.merge(Place(id=place, bases=sorted(bases), lease_until=now + lease_seconds))
            for kind, ends_at in ((Place, Place.lease_until), (RoomThere, RoomThere.until)):
                session.execute(delete(kind).where(ends_at < now))

    def note_room(self, place: str, base: HeldBase, room: Room, need_bytes: int) -> None:
        with self._database.writing() as session:
            now = self._database.now(session)
            sizes = {"base_bytes": room.base, "free_bytes": room.free, "total_bytes": room.total}
            session.merge(RoomThere(place=place, held_base=base, **sizes, until=now + ROOM_SECONDS))
            session.flush()
            say_base_waits(session, base, now)
            if room.base + need_bytes > room.free:
                is_waiting = (Job.status.in_(CLAIMABLE), Job.holder.is_(None), Job.need_bytes.is_not(None))
                for job in session.scalars(select(Job).where(Job.held_base == base, *is_waiting)).all():
                    say_job_waits(session, job, room.free - room.base, now)

    def heartbeat(self, worker: str, lease_seconds: float, free_bytes: int | None = None) -> dict[str, Wish]:
        with self._database.writing() as session:
            now = self._database.now(session)
            values: dict[str, Any] = {"lease_until": now + lease_seconds}
            if free_bytes is not None:
                values["free_bytes"] = free_bytes
            session.execute(update(Worker).where(Worker.id == worker).values(**values))
            held = session.scalars(locking(select(Job).where(Job.holder == worker).order_by(Job.seq))).all()
            for job in held:
                job.lease_until = now + lease_seconds
            return {job.id: wish for job in held if (wish := _wish(job)) is not None}

    def erased(self, tenants: Collection[str]) -> set[str]:
        if not tenants:
            return set()
        with self._database.reading() as session:
            return set(tenants) - set(session.scalars(select(Tenant.id).where(Tenant.id.in_(tenants))))

    def leave(self, worker: str) -> None:
        with self._database.writing() as session:
            # The worker first, as in its heartbeat, which may still be on its way.
            row = session.scalar(select(Worker).where(Worker.id == worker).with_for_update())
            for job in session.scalars(locking(select(Job).where(Job.holder == worker).order_by(Job.seq))):
                _let_go(job)
            if row is not None:
                session.delete(row)

    def wanted_bases(self) -> list[WantedBase]:
        with self._database.reading() as session:
            return wanted_bases(session, self._database.now(session))

    # -- jobs

    def _has_waiting(self, worker: str) -> bool:
        with self._database.reading() as session:
            now = self._database.now(session)
            free = is_free(now, worker)
            waiting = select(Job.id).join(
                Worker,
                and_(Worker.base == Job.base, Worker.quantization == Job.quantization, Worker.weights == Job.weights),
            )
            waiting = waiting.where(Worker.id == worker, Job.status.in_(CLAIMABLE), free, has_memory())
            return session.scalar(waiting.limit(1)) is not None

    def claim(self, worker: str, max_jobs: int, lease_seconds: float) -> list[ClaimedJob]:
        if max_jobs < 1 or not self._has_waiting(worker):
            return []
        with self._database.writing() as session:
            now = self._database.now(session)
            card = session.get(Worker, worker)
            if card is None:
                return []
            free = is_free(now, worker)
            waiting = select(Job).where(Job.held_base == card.held_base, Job.status.in_(CLAIMABLE), free)
            if card.free_bytes is not None:
                waiting = waiting.where(or_(Job.need_bytes.is_(None), Job.need_bytes <= card.free_bytes))
            jobs = list(session.scalars(locking(waiting.order_by(Job.seq), skip_locked=True)))
            if not jobs:
                return []
            tenants = {row.id: row for row in session.scalars(select(Tenant))}
            chosen = choose_jobs(session, jobs, tenants, max_jobs)
            return [
                claimed for job in chosen if (claimed := self._take(session, job, tenants, worker, now, lease_seconds))
            ]

    def _take(
        self, session: Session, job: Job, tenants: dict[str, Tenant], worker: str, now: float, lease_seconds: float
    ) -> ClaimedJob | None:
        if job.holder is not None and _count_loss(session, job):
            return None
        job.holder, job.epoch, job.lease_until = worker, job.epoch + 1, now + lease_seconds
        if job.started_at is not None:
            job.status = "running"
        saved = session.scalars(
            select(Checkpoint)
            .where(Checkpoint.job == job.id, Checkpoint.blob.is_not(None))
            .order_by(Checkpoint.step.desc())
        ).all()
        needed = [row.blob for at, row in enumerate(saved) if at == 0 or row.step == job.best_step]
        tenant = tenants[job.tenant]
        return ClaimedJob(
            claim=Claim(job.id, worker, job.epoch),
            tenant=job.tenant,
            weight=tenant.weight,
            spec=job.spec,
            train_file=job.train_blob,
            validation_file=job.validation_blob,
            hold_out=job.hold_out,
            start_from=job.start_from,
            checkpoints=tuple(blob for blob in needed if blob is not None),
            model=job.tuned_model,
            rows_checked=job.rows_checked,
        )

    def begin(self, claim: Claim, total_steps: int, num_rows: int, num_tokens: int) -> None:
        with self._database.writing() as session:
            job = self._held(session, claim)
            if job.status in ("validating_files", "queued"):
                job.status = "running"
            job.rows_checked = True
            job.started_at = job.started_at or now_seconds()
            job.total_steps, job.num_tokens_per_epoch = total_steps, num_tokens
            job.pace_step = job.pace_at = None
            add_event(session, job.id, "queued", "Files validated, moving job to queued state")
            add_event(session, job.id, "started", "Fine-tuning job started", data={"rows": num_rows})

    def record_steps(self, claim: Claim, steps: Sequence[StepRecord]) -> Wish | None:
        with self._database.writing() as session:
            job = self._held(session, claim)
            for step in steps:
                self._record_step(session, job, step)
            quota = session.scalars(select(Tenant.max_trained_tokens_per_day).where(Tenant.id == job.tenant)).one()
            if quota is not None and job.status == "running" and trained_tokens_today(session, job.tenant) >= quota:
                day = now_seconds() // 86_400
                add_event(
                    session,
                    job.id,
                    f"quota:{day}",
                    "The day's quota of trained tokens is used up; the job goes on after midnight UTC",
                    level="warn",
                )
                job.status = "queued"
            return _wish(job)

    def _record_step(self, session: Session, job: Job, step: StepRecord) -> None:
        data: dict[str, Any] = {
            "step": step.step,
            "total_steps": step.total_steps,
            "train_loss": step.train_loss,
            "learning_rate": step.learning_rate,
            "train_mean_token_accuracy": step.train_accuracy,
            "valid_loss": step.valid_loss,
            "valid_mean_token_accuracy": step.valid_accuracy,
        }
        loss = f"training loss={step.train_loss:.2f}"
        loss += f", validation loss={step.valid_loss:.2f}" if step.valid_loss is not None else ""
        add_event(
            session,
            job.id,
            f"step:{step.step}",
            f"Step {step.step}/{step.total_steps}: {loss}",
            type="metrics",
            data={name: value for name, value in data.items() if value is not None},
        )
        is_new = add_usage(
            session,
            tenant=job.tenant,
            source=job.id,
            step=step.step,
            kind="trained",
            base=job.base,
            model=job.tuned_model,
            num_tokens=step.num_tokens,
        )
        if is_new:
            job.trained_tokens += step.num_tokens
            session.flush()
        if step.step > job.step:
            job.step, job.stepped_at = step.step, now_seconds()
            if job.pace_at is None:
                job.pace_step, job.pace_at = job.step, job.stepped_at

    def record_event(self, claim: Claim, key: str, message: str, level: Level = "info", **data: Any) -> None:
        with self._database.writing() as session:
            add_event(session, self._held(session, claim).id, key, message, level=level, data=data)

    def register_checkpoint(self, claim: Claim, checkpoint: CheckpointRecord) -> list[str]:
        with self._database.writing() as session:
            job = self._held(session, claim)
            row = session.scalar(select(Checkpoint).where(Checkpoint.job == job.id, Checkpoint.step == checkpoint.step))
            unneeded: list[str] = []
            if row is None:
                row = Checkpoint(
                    id=new_id("ftckpt_"),
                    job=job.id,
                    tenant=job.tenant,
                    step=checkpoint.step,
                    model=f"{job.tuned_model}:ckpt-step-{checkpoint.step}",
                    created_at=now_seconds(),
                    metrics={},
                    blob=None,
                    sha256="",
                    num_bytes=0,
                )
                session.add(row)
            elif row.blob is not None and row.blob != checkpoint.prefix:
                unneeded.append(row.blob)
            row.metrics, row.blob = checkpoint.metrics, checkpoint.prefix
            row.sha256, row.num_bytes = checkpoint.sha256, checkpoint.num_bytes
            job.num_losses, job.best_step = 0, checkpoint.best_step
            session.flush()
            unneeded += _retire(session, job)
        return unneeded

    def finish(self, claim: Claim, result: JobResult) -> None:
        with self._database.reading() as session:
            job = self._held(session, claim, lock=False)
            table = _result_table(session, job.id)
        # The result file's key is the job's, so that a finish that broke off half-way writes the same blob again.
        blob = f"tenants/{job.tenant}/files/results_{job.id}"
        written = self._blobs.write(blob, [table])
        with self._database.writing() as session:
            job = self._held(session, claim)
            now = now_seconds()
            file = File(
                id=new_id("file-"),
                tenant=job.tenant,
                filename="step_metrics.csv",
                purpose="fine-tune-results",
                num_bytes=written.num_bytes,
                sha256=written.sha256,
                blob=blob,
                created_at=now,
            )
            session.add(file)
            session.add(
                Model(
                    id=job.tuned_model,
                    tenant=job.tenant,
                    held_base=job.held_base,
                    form=result.form,
                    task=job.spec["task"]["type"],
                    job=job.id,
                    step=result.num_steps,
                    blob=result.prefix,
                    sha256=result.sha256,
                    num_bytes=result.num_bytes,
                    lineage=result.lineage,
                    created_at=now,
                )
            )
            job.result_file, job.evaluation = file.id, result.evaluation
            add_event(session, job.id, "model", f"New fine-tuned model created: {job.tuned_model}")
            _end(session, job, "succeeded", None)
            cost = job_cost(session, job.id)
            message = "The job has successfully completed"
            add_event(session, job.id, "succeeded", message, data={"trained_tokens": job.trained_tokens, "cost": cost})

    def fail(self, claim: Claim, code: str, message: str, param: str | None = None) -> None:
        with self._database.writing() as session:
            job = self._held(session, claim)
            _end(session, job, "failed", {"code": code, "message": message, "param": param})

    def decline(self, claim: Claim, need_bytes: int, free_bytes: int) -> None:
        with self._database.writing() as session:
            # The worker first, as in its heartbeat, which may be on its way.
            worker = session.scalar(locking(select(Worker).where(Worker.id == claim.worker)))
            job = self._held(session, claim)
            job.need_bytes = need_bytes
            if worker is not None:
                worker.free_bytes = min(free_bytes, need_bytes - 1)  # it is not offered the job again at once
            session.flush()
            now = self._database.now(session)
            if job.status not in CLAIMABLE or may_fit(session, job, now):
                _let_go(job)
                say_job_waits(session, job, free_bytes, now)
            else:
                error = {"code": "out_of_memory", "message": nowhere(session, job, now), "param": None}
                _end(session, job, "failed", error)

    def release(self, claim: Claim, *, is_loss: bool = False) -> None:
        with self._database.writing() as session:
            job = self._held(session, claim)
            if not (is_loss and job.status in CLAIMABLE and _count_loss(session, job)):
                _let_go(job)

    def _held(self, session: Session, claim: Claim, lock: bool = True) -> Job:
        query = select(Job).where(Job.id == claim.job)
        job = session.scalar(locking(query) if lock else query)
        if job is None or job.holder != claim.worker or job.epoch != claim.epoch:
            raise LeaseLostError(f"the job {claim.job} is no longer {claim.worker}'s")
        return job


def _wish(job: Job) -> Wish | None:
    if job.status == "paused" or (job.status == "queued" and job.started_at is not None):
        return "pause"  # paused, or paused and resumed again before its holder let go: a claim makes it running
    return "cancel" if job.status in ("cancelled", "failed", "succeeded") else None


def _count_loss(session: Session, job: Job) -> bool:
    """Note that whoever trained the job died; whether that was once too often, which ends it."""
    job.num_losses += 1
    if job.num_losses <= MAX_LOSSES:
        return False
    message = f"The job's worker died {MAX_LOSSES} times without a checkpoint in between."
    _end(session, job, "failed", {"code": "worker_lost", "message": message, "param": None})
    return True


def _let_go(job: Job) -> None:
    job.holder = job.lease_until = None
    if job.status == "running":
        job.status = "queued"


def _end(session: Session, job: Job, status: str, error: dict[str, Any] | None) -> None:
    job.status, job.error, job.finished_at = status, error, now_seconds()
    job.holder = job.lease_until = None
    if error is not None:
        message = f"The job failed: {error['message']}"
        add_event(session, job.id, "failed", message, level="error", data={"code": error["code"]})
    announce_end(session, job)


def _retire(session: Session, job: Job) -> list[str]:
    """Keep the files of the newest three checkpoints, as the OpenAI surface does, and of the best one."""
    rows = session.scalars(
        select(Checkpoint)
        .where(Checkpoint.job == job.id, Checkpoint.blob.is_not(None))
        .order_by(Checkpoint.step.desc())
    ).all()
    retired = [row for row in rows[3:] if row.step != job.best_step]
    gone = [row.blob for row in retired if row.blob is not None]
    for row in retired:
        row.blob = None
    return gone


def _result_table(session: Session, job: str) -> bytes:
    """The result file: a line a step."""
    rows = session.scalars(select(Event).where(Event.job == job, Event.type == "metrics").order_by(Event.seq))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    for event in sorted(rows, key=lambda event: event.data["step"]):
        names = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
        writer.writerow([event.data.get(name, "") for name in names])
    return text.getvalue().encode()
