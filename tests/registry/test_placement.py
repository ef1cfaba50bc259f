"""Where jobs and bases go by memory, and what is said where there is too little."""

from __future__ import annotations

import pytest
from records import Record

from luthier.registry.placement import why_not_held
from luthier.registry.seam import Room, WantedBase, WorkerCard
from luthier.store.held_base import HeldBase

LEASE = 30.0
GIB = 2**30
TINY = HeldBase("tiny")


def worker(
    record: Record, name: str, free: int | None = None, total: int | None = None, place: str | None = None
) -> str:
    card = WorkerCard(name, TINY, "http://127.0.0.1:1", "s", place, free, total)
    record.work.register(card, LEASE)
    return name


def messages(record: Record, tenant: str, job: str) -> list[str]:
    return [event.message for event in reversed(record.jobs.events(tenant, job).items)]


def test_a_declined_job_goes_to_the_worker_that_has_the_memory(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    small, large = worker(record, "small", 2 * GIB, 4 * GIB), worker(record, "large", 10 * GIB, 12 * GIB)
    (claimed,) = record.work.claim(small, 1, LEASE)
    record.work.decline(claimed.claim, 5 * GIB, GIB)
    assert record.jobs.get(caller.tenant, job.id).status == "queued"
    assert messages(record, caller.tenant, job.id)[-1] == (
        "The job waits for memory: it needs 5.00 GiB beyond its base, and at most 10.00 GiB are free for it now"
    )
    assert record.work.wanted_bases() == [], "a worker is there that has it"
    assert record.work.claim(small, 1, LEASE) == []
    record.work.heartbeat(small, LEASE, 4 * GIB)
    assert record.work.claim(small, 1, LEASE) == [], "still too little"
    assert [each.claim.job for each in record.work.claim(large, 1, LEASE)] == [job.id]


def test_a_smaller_job_passes_one_that_waits_for_memory(record: Record) -> None:
    caller = record.caller("a")
    large, small = record.job(caller), record.job(caller)
    name = worker(record, "w", 2 * GIB, 8 * GIB)
    (claimed,) = record.work.claim(name, 1, LEASE)
    assert claimed.claim.job == large.id
    record.work.decline(claimed.claim, 5 * GIB, 2 * GIB)
    assert [each.claim.job for each in record.work.claim(name, 4, LEASE)] == [small.id]
    record.work.heartbeat(name, LEASE, 6 * GIB)  # others have ended
    assert [each.claim.job for each in record.work.claim(name, 4, LEASE)] == [large.id]


def test_a_job_that_fits_nowhere_fails_with_both_figures(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    worker(record, "w", 2 * GIB, 3 * GIB, place="here")
    record.work.attend("here", ["tiny"], LEASE)
    record.work.attend("of other bases", ["other"], LEASE)
    (claimed,) = record.work.claim("w", 1, LEASE)
    record.work.decline(claimed.claim, 5 * GIB, 2 * GIB)
    ended = record.jobs.get(caller.tenant, job.id)
    assert ended.status == "failed"
    assert ended.error == {
        "code": "out_of_memory",
        "message": "The job needs 5.00 GiB of memory beyond its base, and no worker has more than 3.00 GiB for it; "
        "lower method.rank, train.batch_size or train.max_length.",
        "param": None,
    }


def test_another_place_is_asked_to_hold_the_base_with_as_much_beyond_it(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    worker(record, "w", 2 * GIB, 3 * GIB, place="here")
    for place in ("here", "there"):
        record.work.attend(place, ["tiny"], LEASE)
    (claimed,) = record.work.claim("w", 1, LEASE)
    record.work.decline(claimed.claim, 5 * GIB, 2 * GIB)
    assert record.jobs.get(caller.tenant, job.id).status == "queued"
    assert record.work.wanted_bases() == [WantedBase(TINY, 5 * GIB)]
    record.work.note_room("there", TINY, Room(base=GIB, free=20 * GIB, total=24 * GIB), 5 * GIB)
    worker(record, "w2", 19 * GIB, 20 * GIB, place="there")
    assert record.work.wanted_bases() == []
    assert [each.claim.job for each in record.work.claim("w2", 1, LEASE)] == [job.id]


def test_a_place_that_is_too_small_as_well_is_no_way_out(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    worker(record, "w", 2 * GIB, 3 * GIB, place="here")
    for place in ("here", "there"):
        record.work.attend(place, ["tiny"], LEASE)
    record.work.note_room("there", TINY, Room(base=GIB, free=4 * GIB, total=5 * GIB), 0)
    (claimed,) = record.work.claim("w", 1, LEASE)
    record.work.decline(claimed.claim, 5 * GIB, 2 * GIB)
    ended = record.jobs.get(caller.tenant, job.id)
    assert ended.status == "failed"
    assert "no worker has more than 4.00 GiB" in (ended.error or {})["message"]


def test_a_base_that_fits_nowhere_is_told_once_every_place_has_looked(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    for place in ("here", "there"):
        record.work.attend(place, ["tiny"], LEASE)
    assert record.work.wanted_bases() == [WantedBase(TINY)]
    record.work.note_room("here", TINY, Room(base=30 * GIB, free=10 * GIB, total=80 * GIB), 0)
    assert "memory" not in " ".join(messages(record, caller.tenant, job.id)), "the other may have room"
    for _ in range(2):
        record.work.note_room("there", TINY, Room(base=30 * GIB, free=22 * GIB, total=24 * GIB), 0)
    told = [text for text in messages(record, caller.tenant, job.id) if "memory" in text]
    why = "tiny takes 30.00 GiB, and no machine that could hold it has more than 22.00 GiB free"
    assert told == [f"The job waits for memory: {why}"]
    assert record.jobs.get(caller.tenant, job.id).status == "queued", "a larger machine may come"
    with record.database.reading() as session:
        now = record.database.now(session)
        assert why_not_held(session, TINY, now) == why
        assert why_not_held(session, HeldBase("tiny", "nf4"), now) == "", "in 4 bits nobody has looked"
        assert why_not_held(session, TINY, now + LEASE) == "", "the places are gone"
    record.work.note_room("here", TINY, Room(base=30 * GIB, free=40 * GIB, total=80 * GIB), 0)
    with record.database.reading() as session:
        assert why_not_held(session, TINY, record.database.now(session)) == ""


@pytest.mark.parametrize("needs", [(5 * GIB, None), (5 * GIB, 6 * GIB)], ids=str)
def test_what_is_asked_for_helps_at_least_one(record: Record, needs: tuple[int, int | None]) -> None:
    """An unheld base is asked for with the least that one who waits for it needs."""
    caller = record.caller("a")
    jobs = [record.job(caller) for _ in needs]
    worker(record, "w", GIB, 9 * GIB)
    claims = {each.claim.job: each.claim for each in record.work.claim("w", 2, LEASE)}
    for job, need in zip(jobs, needs, strict=True):
        if need is not None:
            record.work.decline(claims[job.id], need, GIB)
    record.work.leave("w")
    assert record.work.wanted_bases() == [WantedBase(TINY, 0)]
