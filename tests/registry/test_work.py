"""Leases, idempotent records and fair claims: what keeps jobs whole when workers die."""

from __future__ import annotations

import pytest
from records import Record

from luthier.registry.problems import LeaseLostError
from luthier.registry.seam import CheckpointRecord, Claim, JobResult, StepRecord, WorkerCard
from luthier.service.answers import job_object
from luthier.store.held_base import HeldBase

LEASE = 30.0


def worker(record: Record, name: str = "w1", lease: float = LEASE) -> str:
    record.work.register(WorkerCard(name, HeldBase("tiny"), "http://127.0.0.1:1", "s"), lease)
    return name


def steps(*numbers: int) -> list[StepRecord]:
    return [StepRecord(n, 10, 1.5, num_tokens=100, learning_rate=1e-3) for n in numbers]


def begin(record: Record, name: str = "w1", max_jobs: int = 1) -> Claim:
    (job,) = record.work.claim(name, max_jobs, LEASE)
    record.work.begin(job.claim, 10, 5, 500)
    return job.claim


def test_a_job_runs_from_claim_to_model(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    claim = begin(record, worker(record))
    assert record.jobs.get(caller.tenant, job.id).status == "running"
    record.work.record_steps(claim, steps(1, 2))
    record.work.register_checkpoint(claim, CheckpointRecord(2, "p/2", "x", 1, {"step": 2}))
    record.work.finish(claim, JobResult("m/1", "x", 1, {"data": "h"}, {}, 2))
    done = record.jobs.get(caller.tenant, job.id)
    assert (done.status, done.trained_tokens, done.step) == ("succeeded", 200, 2)
    assert record.models.find(caller.tenant, job.tuned_model).adapter == "m/1"
    assert record.models.find(caller.tenant, f"{job.tuned_model}:ckpt-step-2").adapter == "p/2"
    table = b"".join(record.files.pieces(record.files.get(caller.tenant, done.result_file or "")))
    assert table.decode().splitlines()[1].startswith("1,1.5,")
    messages = [event.message for event in reversed(record.jobs.events(caller.tenant, job.id).items)]
    assert messages[0].startswith("Created")
    assert messages[-1] == "The job has successfully completed"


def test_a_replayed_step_adds_nothing(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    record.usage.set_price("*", 2.0, 0.0, 0.0)
    claim = begin(record, worker(record))
    for _ in range(3):
        record.work.record_steps(claim, steps(1, 2))
    row = record.jobs.get(caller.tenant, job.id)
    assert row.trained_tokens == 200
    assert record.jobs.costs([row])[row.id] == pytest.approx(200 * 2.0 / 1e6)
    events = record.jobs.events(caller.tenant, job.id, limit=100).items
    assert len([event for event in events if event.type == "metrics"]) == 2


def test_a_jobs_end_is_estimated_from_its_pace_since_it_was_taken_up(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    now = 1_000

    def step(number: int, at: int) -> int | None:
        nonlocal now
        now = at
        record.work.record_steps(claim, steps(number))
        found: int | None = job_object(record.jobs.get(caller.tenant, job.id), 0.0)["estimated_finish"]
        return found

    monkeypatch.setattr("luthier.registry.work.now_seconds", lambda: now)
    claim = begin(record, worker(record))
    assert step(1, at=1_010) is None, "one step has no pace"
    assert step(2, at=1_012) == 1_012 + 8 * 2
    assert step(4, at=1_013) == 1_013 + 6
    assert step(4, at=2_000) == 1_019, "a replayed step says nothing"
    record.work.release(claim)
    now = 5_000
    claim = begin(record)
    assert step(5, at=5_100) is None, "it rested since"
    assert step(6, at=5_101) == 5_105
    record.jobs.pause(caller.tenant, job.id)
    assert job_object(record.jobs.get(caller.tenant, job.id), 0.0)["estimated_finish"] is None


def test_a_dead_workers_job_goes_on_elsewhere_and_the_dead_changes_nothing(record: Record) -> None:
    record.job(record.caller("a"))
    (dead,) = record.work.claim(worker(record, "w1"), 1, LEASE)
    assert record.work.claim(worker(record, "w2"), 1, LEASE) == []
    record.work.heartbeat("w1", -1.0)  # its lease has run out
    (alive,) = record.work.claim("w2", 1, LEASE)
    assert alive.claim.epoch == dead.claim.epoch + 1
    with pytest.raises(LeaseLostError):
        record.work.record_steps(dead.claim, steps(1))
    record.work.begin(alive.claim, 10, 5, 500)


def test_a_job_that_kills_its_workers_ends(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    for number in range(12):
        record.work.claim(worker(record, f"w{number}"), 1, -1.0)
    row = record.jobs.get(caller.tenant, job.id)
    assert row.status == "failed"
    assert (row.error or {})["code"] == "worker_lost"


def test_a_heartbeat_keeps_the_lease(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(record.database, "now", lambda session: now)
    record.job(record.caller("a"))
    (job,) = record.work.claim(worker(record, "w1"), 1, LEASE)
    for _ in range(4):
        now += 0.9 * LEASE
        assert record.work.heartbeat("w1", LEASE) == {}
    assert record.work.claim(worker(record, "w2"), 1, LEASE) == []
    record.work.begin(job.claim, 10, 5, 500)
    now += 1.1 * LEASE
    worker(record, "w3")
    (taken,) = record.work.claim("w3", 1, LEASE)
    assert taken.claim.job == job.claim.job, "without one it goes to another"


def test_pause_resume_and_cancel_reach_the_holder(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    claim = begin(record, worker(record))
    record.jobs.pause(caller.tenant, job.id)
    assert record.work.record_steps(claim, steps(1)) == "pause"
    assert record.work.heartbeat("w1", LEASE) == {job.id: "pause"}
    record.jobs.resume(caller.tenant, job.id)
    assert record.work.heartbeat("w1", LEASE) == {job.id: "pause"}, "it lets go first, then somebody claims it"
    record.work.release(claim)
    again = begin(record)
    assert record.work.record_steps(again, steps(2)) is None
    record.jobs.cancel(caller.tenant, job.id)
    assert record.work.record_steps(again, steps(3)) == "cancel"
    record.work.release(again)
    row = record.jobs.get(caller.tenant, job.id)
    assert (row.status, row.trained_tokens) == ("cancelled", 300)
    assert record.work.claim("w1", 1, LEASE) == []


def test_tenants_are_served_in_turn_by_their_weights(record: Record) -> None:
    large, small = record.caller("large"), record.caller("small", weight=2.0)
    for _ in range(6):
        record.job(large)
    for _ in range(3):
        record.job(small)
    claimed = record.work.claim(worker(record), 6, LEASE)
    assert [job.tenant for job in claimed].count(small.tenant) == 3
    assert claimed[0].tenant == large.tenant, "the oldest, where nobody runs"


def test_quotas_hold_jobs_back(record: Record) -> None:
    caller = record.caller("a", max_running_jobs=1, max_trained_tokens_per_day=150)
    first, second = record.job(caller), record.job(caller)
    name = worker(record)
    (held,) = record.work.claim(name, 5, LEASE)
    assert held.claim.job == first.id
    assert record.work.claim(name, 5, LEASE) == [], "a job counts from its claim on"
    claim = held.claim
    record.work.begin(claim, 10, 5, 500)
    assert record.work.claim(name, 5, LEASE) == []
    assert record.work.record_steps(claim, steps(1)) is None
    assert record.work.record_steps(claim, steps(2)) == "pause"
    record.work.release(claim)
    assert record.work.claim(name, 5, LEASE) == [], "the day's tokens are used up"
    assert record.jobs.get(caller.tenant, second.id).status == "queued"


def test_only_the_newest_checkpoints_keep_their_files(record: Record) -> None:
    caller = record.caller("a")
    job = record.job(caller)
    claim = begin(record, worker(record))
    gone = [record.work.register_checkpoint(claim, CheckpointRecord(n, f"p/{n}", "x", 1)) for n in range(1, 6)]
    assert gone == [[], [], [], ["p/1"], ["p/2"]]
    assert [c.step for c in record.jobs.checkpoints(caller.tenant, job.id).items] == [5, 4, 3]
