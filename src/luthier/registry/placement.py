"""Where bases and jobs go: who is asked to hold what, which jobs a worker takes, what is said where memory is short."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from luthier.registry.events import add_event
from luthier.registry.seam import WantedBase
from luthier.registry.tenants import num_running, trained_tokens_today
from luthier.store.held_base import HeldBase
from luthier.store.tables import Demand, Job, Place, RoomThere, Tenant, Worker

CLAIMABLE = ("validating_files", "queued", "running")
DEMAND_SECONDS = 120.0
"""How long a request for a base counts after it was made."""
ROOM_SECONDS = 180.0
"""How long what a place said of a base counts: longer than until it looks again."""


def live_workers(session: Session, base: HeldBase | None, now: float) -> list[Worker]:
    """Workers whose lease has not run out: those that hold this, or all."""
    query = select(Worker).where(Worker.lease_until > now)
    if base is not None:
        query = query.where(Worker.held_base == base)
    return list(session.scalars(query.order_by(func.length(Worker.id), Worker.id)))


def has_memory() -> ColumnElement[bool]:
    """Whether a worker has what a job is known to need."""
    return or_(Job.need_bytes.is_(None), Worker.free_bytes.is_(None), Job.need_bytes <= Worker.free_bytes)


def is_free(now: float, worker: str) -> ColumnElement[bool]:
    """Held by nobody, or by another that is dead. What a worker holds it never claims again, however late it is."""
    return or_(Job.holder.is_(None), and_(Job.lease_until < now, Job.holder != worker))


def choose_jobs(session: Session, jobs: list[Job], tenants: dict[str, Tenant], max_jobs: int) -> list[Job]:
    """Which of the waiting jobs to take: of the tenant with the fewest running per weight first."""
    running = {tenant: num_running(session, tenant) for tenant in {job.tenant for job in jobs}}
    for job in jobs:
        if job.holder is not None:
            running[job.tenant] -= 1  # its holder is dead
    is_over = {
        tenant: (quota := tenants[tenant].max_trained_tokens_per_day) is not None
        and trained_tokens_today(session, tenant) >= quota
        for tenant in running
    }
    chosen: list[Job] = []
    left = [job for job in jobs if not is_over[job.tenant]]
    while left and len(chosen) < max_jobs:
        job = min(left, key=lambda job: (running[job.tenant] / tenants[job.tenant].weight, job.seq))
        left.remove(job)
        most = tenants[job.tenant].max_running_jobs
        if most is None or running[job.tenant] < most:
            chosen.append(job)
            running[job.tenant] += 1
    return chosen


def wanted_bases(session: Session, now: float) -> list[WantedBase]:
    """What somebody waits for and nobody has who could help, the longest waiting first."""
    largest: dict[HeldBase, float] = {}
    for worker in live_workers(session, None, now):
        most = float("inf") if worker.total_bytes is None else float(worker.total_bytes)
        largest[worker.held_base] = max(most, largest.get(worker.held_base, 0.0))
    waits: dict[HeldBase, tuple[float, int]] = {}

    def add(base: HeldBase, at: float, need: int) -> None:
        first, least = waits.get(base, (at, need))
        waits[base] = (min(first, at), min(least, need))

    for row in session.scalars(select(Demand)):
        if row.wanted_at > now - DEMAND_SECONDS and row.held_base not in largest:
            add(row.held_base, row.wanted_at, 0)
    is_unheld = or_(Job.holder.is_(None), Job.lease_until < now)
    columns = (Job.base, Job.quantization, Job.weights, Job.need_bytes)
    waiting = select(*columns, func.min(Job.created_at)).where(Job.status.in_(CLAIMABLE), is_unheld)
    for name, quantization, weights, need, at in session.execute(waiting.group_by(*columns)):
        base = HeldBase(name, quantization, weights)
        if base not in largest or (need or 0) > largest[base]:
            add(base, float(at), need or 0)
    return [WantedBase(base, waits[base][1]) for base in sorted(waits, key=lambda base: waits[base][0])]


def may_fit(session: Session, job: Job, now: float) -> bool:
    """Whether a worker or a place that is here could ever have what the job is known to need."""
    need = job.need_bytes or 0
    workers = live_workers(session, job.held_base, now)
    if any(worker.total_bytes is None or need <= worker.total_bytes for worker in workers):
        return True
    rooms = _rooms(session, job.held_base, now)
    taken = {worker.place for worker in workers}  # a place starts one worker of a base
    return any(
        place not in rooms or rooms[place].base_bytes + need <= rooms[place].total_bytes
        for place in _places(session, job.held_base, now)
        if place not in taken
    )


def say_job_waits(session: Session, job: Job, free_bytes: int, now: float) -> None:
    """Tell a job's owner once that it waits for memory.

    Args:
        free_bytes: Where it was declined last.
    """
    others = [worker.free_bytes or 0 for worker in live_workers(session, job.held_base, now)]
    free = max([0, free_bytes, *others])
    need = gib(job.need_bytes or 0)
    message = f"The job waits for memory: it needs {need} beyond its base, and at most {gib(free)} are free for it now"
    add_event(session, job.id, f"memory:{job.need_bytes}", message, level="warn")


def nowhere(session: Session, job: Job, now: float) -> str:
    """Why a job fits on none of the machines that are there."""
    most = [worker.total_bytes or 0 for worker in live_workers(session, job.held_base, now)]
    rooms = _rooms(session, job.held_base, now).values()
    most += [room.total_bytes - room.base_bytes for room in rooms]
    return (
        f"The job needs {gib(job.need_bytes or 0)} of memory beyond its base, and no worker has more than "
        f"{gib(max([0, *most]))} for it; lower method.rank, train.batch_size or train.max_length."
    )


def say_base_waits(session: Session, base: HeldBase, now: float) -> None:
    """Tell the owners of jobs that wait for a base, once each, where nobody has the memory to hold it."""
    why = why_not_held(session, base, now)
    if not why:
        return
    waiting = select(Job.id).where(Job.held_base == base, Job.status.in_(CLAIMABLE), Job.holder.is_(None))
    for job in session.scalars(waiting.order_by(Job.seq)).all():
        add_event(session, job, "memory:base", f"The job waits for memory: {why}", level="warn")


def why_not_held(session: Session, base: HeldBase, now: float) -> str:
    """Why nobody holds a base, where memory is the reason on every machine that could; empty otherwise."""
    rooms = _rooms(session, base, now)
    places = _places(session, base, now)
    if not places or live_workers(session, base, now) or not places <= set(rooms):
        return ""
    found = [rooms[place] for place in places]
    if any(room.base_bytes <= room.free_bytes for room in found):
        return ""
    widest = max(found, key=lambda room: room.free_bytes)
    return (
        f"{base} takes {gib(widest.base_bytes)}, and no machine that could hold it has more than "
        f"{gib(widest.free_bytes)} free"
    )


def gib(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _places(session: Session, base: HeldBase, now: float) -> set[str]:
    return {row.id for row in session.scalars(select(Place).where(Place.lease_until > now)) if base.name in row.bases}


def _rooms(session: Session, base: HeldBase, now: float) -> dict[str, RoomThere]:
    rows = session.scalars(select(RoomThere).where(RoomThere.held_base == base, RoomThere.until > now))
    return {row.place: row for row in rows}
